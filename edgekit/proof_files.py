"""What the proof of a language model must know of a file, whatever its format.

Knows where GGUF and ONNX files say it, and which module tries each; measures nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgekit import language_model, proof_tensors
from edgekit.formats import gguf, onnx


@dataclass(frozen=True)
class LanguageFile:
    """``type`` is that of most weights; ``least_bits`` are those of the smallest matrix, with its
    scales where the format counts them; ``trial`` is the module whose functions try the file in
    its engine (``llama_trial`` says what they answer).
    """

    format: str
    type: str
    size_bytes: int
    parameters: int
    least_bits: float
    context_length: int | None
    causal: bool
    chat_template: str | None
    trial: str


def read(path: Path) -> LanguageFile:
    """The facts of a GGUF file or an ONNX language model. Raises what reading a header raises."""
    return _onnx(path) if path.suffix.lower() == ".onnx" else _gguf(path)


def _gguf(path: Path) -> LanguageFile:
    header = gguf.read(path)
    own = f"{header.architecture}."
    length = header.metadata.get(f"{own}context_length")
    template = header.metadata.get("tokenizer.chat_template")
    bits = (t.size_bytes * 8 / t.elements for t in header.tensors if len(t.shape) > 1)
    return LanguageFile(
        format="gguf",
        type=header.main_type(),
        size_bytes=header.file_size,
        parameters=header.parameters,
        least_bits=min(bits, default=16),
        context_length=None if length is None else int(length),
        causal=header.metadata.get(f"{own}attention.causal") is not False,
        chat_template=str(template) if template else None,
        trial="edgekit.runtimes.llama_trial",
    )


def _onnx(path: Path) -> LanguageFile:
    header, facts = onnx.read(path), language_model.beside(path)
    return LanguageFile(
        format="onnx",
        # The reference lies beside the file that it is the reference of, and has its facts.
        type="F32" if proof_tensors.least_bits(header) == 32 else facts.type,
        size_bytes=proof_tensors.size_bytes(path, header),
        parameters=_parameters(header),
        least_bits=proof_tensors.least_bits(header),
        context_length=facts.context_length,
        causal=True,
        chat_template=language_model.chat_template(path),
        trial="edgekit.runtimes.ort_trial",
    )


def _parameters(header: onnx.OnnxHeader) -> int:
    """Weights of packed matrices as often as they stand for one, and all that are plain floats."""
    packed, scales = {}, set()
    for node in header.nodes:
        if node.op_type == "MatMulNBits":
            packed[node.inputs[1]] = int(node.attributes["K"]) * int(node.attributes["N"])
            scales.add(node.inputs[2].removesuffix(".wide"))
    plain = (
        t.elements
        for t in header.initializers
        if t.dtype in ("float32", "float16") and t.name not in scales
    )
    return sum(packed.values()) + sum(plain)
