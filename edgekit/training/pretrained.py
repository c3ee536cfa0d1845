"""A Hugging Face folder as the start of a training, and as its end.

Knows transformers and the files of such folders; never what is trained, nor how.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from edgekit import _fs, model_folder
from edgekit.converter import convert
from edgekit.errors import DataError, SourceError
from edgekit.formats import json_file
from edgekit.source import ModelSource, source
from edgekit.training import checkpoint
from edgekit.training.run import Run
from edgekit.training.texts import Chat


def opened(run: Run, spec: str) -> ModelSource:
    """The checked folder that ``spec`` names; a GGUF file becomes one, in the run's scratch folder.

    Raises SourceError for what is no language or image model, and as ``edgekit.source``.
    """
    found = source(spec)
    if found.kind == "gguf":

        def make(folder: Path) -> None:
            convert(spec, folder, dtype="f32")

        found = source(run.once("base", make))
    if found.kind != "hf":
        raise SourceError(
            f"{spec} is no Hugging Face folder", hint="a folder with a config.json, or a GGUF file"
        )
    return found


def model(found: ModelSource, kind: str, *, eager: bool = False) -> Any:
    """The class ``kind`` of transformers with the folder's weights, float32; ``eager`` computes
    attention so that its distributions can be had. Raises SourceError.
    """
    import transformers

    with _quiet():
        try:
            made, report = getattr(transformers, kind).from_pretrained(
                found.path,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
                attn_implementation="eager" if eager else "sdpa",
            )
        except (ValueError, OSError, RuntimeError, KeyError, TypeError) as error:
            raise SourceError(
                f"transformers cannot load {found.spec}: {str(error).strip()[:160]}"
            ) from error
    if report["missing_keys"]:
        raise SourceError(f"{found.spec} lacks {sorted(report['missing_keys'])[0][:80]}")
    made.config.use_cache = False
    return made


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging as library

    level, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity(logging.ERROR)
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(level)
        if bars:
            library.enable_progress_bar()


class Chats:
    """The tokenizer of a folder with its chat template."""

    def __init__(self, found: ModelSource) -> None:
        import transformers

        with _quiet():
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                found.path, local_files_only=True, trust_remote_code=False
            )
        if not self._tokenizer.chat_template:
            raise DataError(
                f"{found.spec} has no chat template", hint="take a model that is made for chats"
            )
        pad = self._tokenizer.pad_token_id
        self.pad = int(self._tokenizer.eos_token_id if pad is None else pad)

    def tokens(self, pairs: Sequence[tuple[str, str]]) -> list[Chat]:
        """A chat of each question and answer: what stands before the answer, and the answer with
        its end, as the template writes them. Raises DataError for a template that does not go on
        where it asked for an answer.
        """
        asked, told = [], []
        for prompt, answer in pairs:
            turns = [{"role": "user", "content": prompt}]
            before = self._text(turns, add_generation_prompt=True)
            whole = self._text([*turns, {"role": "assistant", "content": answer}])
            if not whole.startswith(before):
                raise DataError("the chat template does not begin answers as it asks for them")
            asked.append(before)
            told.append(whole[len(before) :].rstrip("\n"))
        ids = [self._tokenizer(t, add_special_tokens=False)["input_ids"] for t in (asked, told)]
        return list(zip(*ids, strict=True))

    def _text(self, turns: list[dict[str, str]], **options: Any) -> str:
        return str(self._tokenizer.apply_chat_template(turns, tokenize=False, **options))


def write(
    folder: Path,
    found: ModelSource,
    state: Mapping[str, torch.Tensor],
    changes: Mapping[str, Any] | None = None,
) -> None:
    """Fill ``folder`` with ``found``'s companions and the weights ``state``, float32; ``changes``
    are other values of its config.json.
    """
    for name in model_folder.COMPANIONS:
        if name in found.files and "/" not in name:
            body = found.file_path(name).read_bytes()
            if name == model_folder.CONFIG:
                config = json_file.parse(body) | dict(changes or {})
                config |= {key: "float32" for key in ("dtype", "torch_dtype") if key in config}
                body = (json.dumps(config, indent=1) + "\n").encode()
            _fs.write_atomic(folder / name, body)
    checkpoint.write(folder / model_folder.WEIGHTS, dict(state))


def state_of(made: Any) -> dict[str, torch.Tensor]:
    """The weights of a model of transformers, each once: an output that is the embedding's table is
    left to the config.
    """
    tied = set(getattr(made, "_tied_weights_keys", None) or ()) if _ties(made) else set()
    return {
        name: each.detach().contiguous().clone()
        for name, each in made.state_dict().items()
        if name not in tied
    }


def _ties(made: Any) -> bool:
    return bool(getattr(made.config, "tie_word_embeddings", False))
