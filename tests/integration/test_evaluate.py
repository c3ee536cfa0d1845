"""Perplexity and KL divergence are those of an independent computation, and of llama-perplexity."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny
from numpy.typing import NDArray

from edgekit import evaluate
from edgekit.errors import InferenceError, LoadError, UsageError
from edgekit.exporter import export
from edgekit.exporters import hf_to_gguf, quantizer
from edgekit.formats import gguf
from edgekit.source import source

TEXT = resources.files("edgekit.exporters").joinpath("calibration.txt").read_text("utf-8")
ROOT = Path(__file__).resolve().parents[2]


class Pair(NamedTuple):
    """A tiny model and another one that differs in the epsilon of its norms, as folder and file."""

    folder: Path
    file: Path
    other_folder: Path
    other_file: Path


class Truth(NamedTuple):
    """Per scored token, in float64: [chunks, tokens of a chunk]."""

    kl: NDArray[np.float64]
    nll: NDArray[np.float64]
    reference_nll: NDArray[np.float64]
    same: NDArray[np.bool_]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """The pair of a name in ``tiny.MODELS``, made once."""
    root = tmp_path_factory.mktemp("pairs")
    epsilons = {"gpt2": "layer_norm_epsilon", "tinyllama": "rms_norm_eps"}

    def make(name: str) -> Pair:
        made = []
        for side, epsilon in (("one", 1e-5), ("other", 3e-2)):
            folder = root / f"{name}-{side}"
            file = folder.with_suffix(".gguf")
            if not file.exists():
                longer = {} if name == "gpt2" else {"max_position_embeddings": 2048}
                tiny.make(name, folder, **{epsilons[name]: epsilon}, **longer)
                hf_to_gguf.write(source(folder), file, "F32")
            made += [folder, file]
        return Pair(*made)

    return make


def log_probs(folder: Path, ids: list[int]) -> NDArray[np.float64]:
    """What transformers says in float64, [len(ids), vocabulary]."""
    import torch
    import transformers

    net = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        logits = net.double().eval()(torch.tensor([ids])).logits[0]
        return np.asarray(torch.log_softmax(logits, dim=-1).numpy(), dtype=np.float64)


def truth(pair: Pair, text: str, n_ctx: int, chunks: int) -> Truth:
    """The figures of every scored token, computed in another way from other code."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(pair.folder)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    wants_bos = gguf.read(pair.file).metadata.get("tokenizer.ggml.add_bos_token", False)
    if wants_bos:
        ids = [tokenizer.bos_token_id, *ids]
    rows: list[list[Any]] = [[], [], [], []]
    for i in range(chunks):
        chunk = ids[i * n_ctx : (i + 1) * n_ctx]
        if wants_bos:
            chunk[0] = tokenizer.bos_token_id
        scored = slice(n_ctx // 2, n_ctx - 1)
        targets = chunk[n_ctx // 2 + 1 :]
        own, other = (log_probs(side, chunk)[scored] for side in (pair.folder, pair.other_folder))
        rows[0].append((np.exp(other) * (other - own)).sum(axis=1))
        rows[1].append(-own[np.arange(len(targets)), targets])
        rows[2].append(-other[np.arange(len(targets)), targets])
        rows[3].append(own.argmax(axis=1) == other.argmax(axis=1))
    return Truth(*map(np.array, rows))


@pytest.mark.parametrize(
    ("name", "n_ctx", "chunks"),
    [("tinyllama", 64, 3), ("gpt2", 63, 3), ("tinyllama", 1100, 2)],
    ids=["with BOS", "without BOS, odd length", "chunks of several blocks"],
)
def test_figures_are_those_of_transformers_in_float64(
    name: str, n_ctx: int, chunks: int, pair: Callable[[str], Pair]
) -> None:
    models = pair(name)
    expected = truth(models, TEXT, n_ctx, chunks)
    found = evaluate.compare(
        models.file, models.other_file, TEXT, n_ctx=n_ctx, chunks=chunks, threads=1
    )
    assert (found.chunks, found.tokens) == (chunks, chunks * ((n_ctx - 1) // 2))
    assert found.token_kl == pytest.approx(expected.kl.ravel(), rel=0.05, abs=2e-3)
    assert found.mean_kl.value == pytest.approx(expected.kl.mean(), rel=0.01)
    assert found.perplexity == pytest.approx(np.exp(expected.nll.mean()), rel=0.01)
    assert found.reference_perplexity == pytest.approx(
        np.exp(expected.reference_nll.mean()), rel=0.01
    )
    ratio = np.exp((expected.nll - expected.reference_nll).mean())
    assert found.perplexity_ratio.value == pytest.approx(ratio, rel=0.01)
    assert found.top1.value == pytest.approx(expected.same.mean(), abs=0.011)
    alone = evaluate.perplexity(models.file, TEXT, n_ctx=n_ctx, chunks=chunks, threads=1)
    assert alone.value.value == pytest.approx(found.perplexity, rel=1e-6)


def test_percentiles_and_intervals_are_those_of_the_tokens_and_of_the_chunks(
    pair: Callable[[str], Pair],
) -> None:
    models = pair("tinyllama")
    found = evaluate.compare(models.file, models.other_file, TEXT, n_ctx=64, chunks=3, threads=1)
    kl = np.array(found.token_kl).reshape(3, 31)
    shares = (50, 90, 99, 99.9, 100)
    ours = (found.median_kl, found.p90_kl, found.p99_kl, found.p999_kl, found.max_kl)
    assert ours == pytest.approx(np.percentile(kl, shares))
    means = kl.mean(axis=1)
    half = 4.302653 * means.std(ddof=1) / np.sqrt(3)  # Student's t, 2 degrees
    assert found.mean_kl.low == pytest.approx(kl.mean() - half, rel=1e-5)
    assert found.mean_kl.high == pytest.approx(kl.mean() + half, rel=1e-5)
    one = evaluate.compare(models.file, models.other_file, TEXT, n_ctx=64, chunks=1, threads=1)
    half = 2.042272 * kl[0].std(ddof=1) / np.sqrt(31)  # 30 degrees: its tokens
    assert one.mean_kl.high == pytest.approx(kl[0].mean() + half, rel=1e-4)


def test_a_model_is_no_distance_from_itself(smollm2_gguf: Path) -> None:
    found = evaluate.compare(smollm2_gguf, smollm2_gguf, TEXT, n_ctx=128, chunks=2, threads=1)
    assert set(found.token_kl) == {0.0}
    assert found.top1.value == 1
    assert vars(found.perplexity_ratio) == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_the_bytes_of_a_report_are_json(pair: Callable[[str], Pair]) -> None:
    models = pair("gpt2")
    found = evaluate.compare(models.file, models.other_file, TEXT, n_ctx=32, chunks=1, threads=1)
    body = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert body["mean_kl"].keys() == {"value", "low", "high"}
    assert "token_kl" not in body


def test_an_artifact_is_measured_with_the_adapter_that_it_ships(
    pair: Callable[[str], Pair], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    import torch
    import transformers

    folder = pair("tinyllama").folder
    net = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tuned = peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(1)
    for name, value in tuned.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(value, std=0.2)
    tuned.save_pretrained(tmp_path / "adapter")
    made = {
        mode: export(
            source(folder),
            out=tmp_path / mode,
            type="F32",
            adapter=tmp_path / "adapter",
            adapter_mode=mode,
            receipt=False,
        ).path
        for mode in ("keep", "merge")
    }
    sizes: dict[str, Any] = {"n_ctx": 64, "chunks": 2, "threads": 1}
    apart = evaluate.compare(made["keep"] / "model.gguf", made["merge"], TEXT, **sizes)
    applied = evaluate.compare(made["keep"], made["merge"], TEXT, **sizes)
    assert apart.mean_kl.value > 0.1
    assert applied.mean_kl.value < 1e-4


def _spoilt(file: Path, out: Path) -> Path:
    """A copy whose last norm holds a NaN."""
    out.write_bytes(file.read_bytes())
    norm = gguf.read(out).tensor("output_norm.weight")
    data = np.memmap(out, np.float32, mode="r+", offset=norm.offset, shape=(4,))
    data[0] = np.nan
    data.flush()
    return out


def test_a_model_that_computes_no_numbers_is_an_error(
    pair: Callable[[str], Pair], tmp_path: Path
) -> None:
    spoilt = _spoilt(pair("tinyllama").file, tmp_path / "nan.gguf")
    with pytest.raises(InferenceError, match="no finite numbers"):
        evaluate.perplexity(spoilt, TEXT, n_ctx=64, chunks=1, threads=1)


def test_models_that_do_not_share_a_tokenizer_are_refused(pair: Callable[[str], Pair]) -> None:
    with pytest.raises(UsageError, match=r"cannot be compared: one knows \d+ tokens"):
        evaluate.compare(pair("tinyllama").file, pair("gpt2").file, TEXT, n_ctx=64, threads=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_ctx": 512}, "n_ctx 512 is more than the 256 this model was trained for"),
        ({"n_ctx": 7}, "n_ctx must be at least 8, not 7"),
        ({"chunks": 0}, "chunks must be at least 1, not 0"),
        ({"threads": 0}, "n_threads must be a whole number from 1 to 512, not 0"),
    ],
)
def test_settings_out_of_bounds_are_refused(
    settings: dict[str, int], message: str, pair: Callable[[str], Pair]
) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate.perplexity(pair("gpt2").file, TEXT, **{"n_ctx": 64, **settings})


def test_a_text_of_exactly_one_chunk_is_enough_and_a_shorter_one_is_not(
    pair: Callable[[str], Pair],
) -> None:
    file = pair("gpt2").file
    assert evaluate.perplexity(file, " a" * 64, n_ctx=64, threads=1).tokens == 31
    with pytest.raises(UsageError, match="the text has 63 tokens, less than one chunk of 64"):
        evaluate.perplexity(file, " a" * 63, n_ctx=64, threads=1)


def test_a_runtime_that_gives_no_logits_says_so(tmp_path: Path) -> None:
    from edgekit.scorer import ModelFiles

    with pytest.raises(LoadError, match="the runtime 'echo' cannot score text"):
        ModelFiles("echo", str(tmp_path / "any.gguf")).open()


# The command


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_the_command_prints_figures_as_json_and_draws_them(
    cli: Any, pair: Callable[[str], Pair], text_file: Path, tmp_path: Path
) -> None:
    models = pair("gpt2")
    done = cli(
        *("eval", models.file, "--against", models.other_file, "--text", text_file),
        *("--ctx", 64, "--chunks", 2, "--threads", 1, "--plot", "kl.svg", "--json"),
    )
    assert done.code == 0, done.stderr
    body = json.loads(done.stdout)
    assert body["chunks"] == 2 and body["mean_kl"]["value"] > 0
    assert done.stderr == ""
    assert "<svg" in (tmp_path / "kl.svg").read_text()[:1000]


def test_the_command_prints_tables(cli: Any, pair: Callable[[str], Pair], text_file: Path) -> None:
    models = pair("gpt2")
    options = ("--text", text_file, "--ctx", 64, "--chunks", 2, "--threads", 1)
    alone = cli("eval", models.file, *options)
    assert alone.code == 0, alone.stderr
    assert re.search(r"^perplexity +[\d.e+]+ \(", alone.stdout, flags=re.MULTILINE)
    assert "evaluate" in alone.stderr
    both = cli("eval", models.file, "--against", models.other_file, *options)
    assert re.search(r"^mean KL +[\d.e-]+ \([\d.e-]+ \.\. [\d.e-]+\)", both.stdout, re.MULTILINE)
    assert "62 tokens scored" in both.stdout


def test_without_a_text_the_command_reads_one_that_nothing_was_calibrated_on(
    cli: Any, pair: Callable[[str], Pair]
) -> None:
    done = cli("eval", pair("gpt2").file, "--ctx", 64, "--chunks", 1, "--threads", 1, "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["text"] == "builtin"
    lines = evaluate.read_text(None).splitlines()
    assert not {line for line in lines if len(line) > 80} & set(TEXT.splitlines())


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--text", "none.txt"], 2, "cannot read the text none.txt: No such file or directory"),
        (["--text", "latin1.txt"], 2, "the text latin1.txt is not UTF-8"),
        (["--plot", "kl.png"], 2, "--plot draws KL divergence"),
        (["--against", "x.gguf", "--plot", "kl.pdf"], 2, "cannot draw kl.pdf"),
        (["--text", "text.txt", "--against", "nowhere"], 5, "nowhere does not exist"),
        (
            ["--text", "text.txt", "--ctx", "64", "--against", "text.txt"],
            5,
            "text.txt: is not a GGUF file",
        ),
        (["second.gguf"], 2, "this takes one model, not 2"),
        (["--ctx", "1"], 2, "Invalid value for '--ctx'"),
    ],
)
def test_wrong_use_is_one_clear_line(
    options: list[str],
    code: int,
    message: str,
    cli: Any,
    pair: Callable[[str], Pair],
    text_file: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "latin1.txt").write_bytes("Käse".encode("latin-1"))
    done = cli("eval", pair("gpt2").file, *options)
    assert done.code == code
    assert message in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latin1.txt", "text.txt"]


def test_ctrl_c_ends_an_evaluation_within_five_seconds(smollm2_gguf: Path, text_file: Path) -> None:
    command = [sys.executable, "-m", "edgekit", "eval", smollm2_gguf, "--text", text_file]
    with subprocess.Popen(
        [*command, "--threads", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        line = ""
        while not line.startswith("evaluate"):
            line = process.stderr.readline()
            assert line, "it ended too early"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert children
        time.sleep(1)  # in the middle of a chunk
        started_s = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert time.monotonic() - started_s < 5
    assert process.returncode == 130
    assert not any(os.path.exists(f"/proc/{child}") for child in children)


# llama-perplexity


@pytest.fixture(scope="module")
def llama_perplexity() -> Path:
    """The peer's program, compiled once per machine."""
    built = subprocess.run([ROOT / "scripts" / "build", "--tools"], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return Path(built.stdout.strip()) / "llama-perplexity"


def _peer(program: Path, *arguments: Any) -> str:
    argv = [str(program), *map(str, arguments), "-t", "1"]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K_M"])
def test_figures_equal_those_of_llama_perplexity_within_one_percent(
    kind: str, smollm2_gguf: Path, llama_perplexity: Path, tmp_path: Path
) -> None:
    reference, model, base = tmp_path / "f16.gguf", tmp_path / "model.gguf", tmp_path / "base"
    for start, out, type_name in ((smollm2_gguf, reference, "F16"), (reference, model, kind)):
        quantizer.quantize(
            start, out, type_name, imatrix=None, overrides=(), on_tensor=lambda *_: None
        )
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    sizes = ("-c", 512, "--chunks", 4)
    _peer(llama_perplexity, "-m", reference, "-f", text, *sizes, "--kl-divergence-base", base)
    report = _peer(
        *(llama_perplexity, "-m", model, "--kl-divergence", "--kl-divergence-base", base)
    )
    found = evaluate.compare(model, reference, TEXT, n_ctx=512, chunks=4, threads=1)
    figures = {
        r"Mean PPL\(Q\) +": found.perplexity,
        r"Mean PPL\(base\) +": found.reference_perplexity,
        r"Mean PPL\(Q\)/PPL\(base\) +": found.perplexity_ratio.value,
        "Mean +KLD": found.mean_kl.value,
        "Median +KLD": found.median_kl,
        r"99\.0% +KLD": found.p99_kl,
        "Same top p": 100 * found.top1.value,
    }
    for pattern, ours in figures.items():
        match = re.search(rf"^{pattern}: +([\d.]+)", report, flags=re.MULTILINE)
        assert match is not None, pattern
        assert ours == pytest.approx(float(match[1]), rel=0.01), pattern
