"""The examples run as they are shown, and clean up after themselves."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

# The demo's own spec, but so impatient that the policy fires within a few steps.
SPEC = """\
name: byte-gpt
unit: iterations
total: 40
learning_rate: {init: 0.0, peak: 1.0e-3, min: 0.0, warmup: 4, decay: {style: constant}}
weight_decay: {start: 0.01, end: 0.1, style: cosine}
groups: [{name: matrices}, {name: no_decay, weight_decay_multiplier: 0.0}]
policies: [{kind: plateau, window: 2, patience: 0, threshold: 0.5, mode: act}]
feedback: {delay: 4, timeout: 30s}
"""


def _environment(folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    return {**kept, **loopback, "TMPDIR": os.fspath(folder), "OMP_NUM_THREADS": "1"}


@contextmanager
def _demo(root: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Start the demo with a folder of its own for everything temporary."""
    spec, temporary = tmp_path / "spec.yaml", tmp_path / "temporary"
    spec.write_text(SPEC)
    temporary.mkdir()
    command = [sys.executable, os.fspath(root / "examples/demo.py")]
    command += ["--spec", os.fspath(spec), "--out", os.fspath(tmp_path / "out")]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**_environment(temporary), "COLUMNS": "300"},
    ) as demo:
        try:
            yield demo
        finally:
            if demo.poll() is None:
                demo.kill()


def _processes_that_name(folder: Path) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = entry.read_bytes().decode(errors="replace")
        except OSError:  # it ended meanwhile
            continue
        if os.fspath(folder) in text:
            found.append(text)
    return found


def test_the_demo_shows_what_it_says(root: Path, tmp_path: Path) -> None:
    with _demo(root, tmp_path) as demo:
        output, _ = demo.communicate(timeout=200)
    assert demo.returncode == 0, output
    assert "both ranks used bit-identical LR and WD at every one of 40 steps" in output
    assert "none below" in output  # the reason of an adjustment
    assert 'run="byte-gpt"' in output  # the metrics
    assert (tmp_path / "out/demo.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "temporary").iterdir()) == []
    assert _processes_that_name(tmp_path / "temporary") == []


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_demo_leaves_nothing_behind(
    root: Path, tmp_path: Path, sign: signal.Signals
) -> None:
    with _demo(root, tmp_path) as demo:
        assert demo.stdout is not None
        seen = []
        for line in demo.stdout:
            seen.append(line)
            if "torch.distributed.run" in line:
                break
        else:
            pytest.fail("".join(seen))
        demo.send_signal(sign)
        rest = demo.stdout.read()
        demo.wait(timeout=100)
    assert demo.returncode == 130, rest
    assert list((tmp_path / "temporary").iterdir()) == []
    assert _processes_that_name(tmp_path / "temporary") == []


def test_the_training_script_resumes_from_its_checkpoint(
    root: Path,
    tmp_path: Path,
    serving: Callable[[list[str]], AbstractContextManager[tuple[str, str]]],
) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(SPEC)

    def train(address: str, steps: int, trace: Path) -> list[list[dict[str, object]]]:
        trace.mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
        command += [os.fspath(root / "examples/train_ddp.py"), "--server", address]
        command += ["--spec", os.fspath(spec), "--steps", str(steps), "--save-every", "6"]
        command += ["--trace", os.fspath(trace), "--checkpoint", os.fspath(tmp_path / "model.pt")]
        done = subprocess.run(
            command, env=_environment(tmp_path), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return [
            [json.loads(line) for line in (trace / f"rank{rank}.jsonl").read_text().splitlines()]
            for rank in (0, 1)
        ]

    with serving([sys.executable, "-m", "lrpilot.server.cli"]) as (address, _):
        first = train(address, 16, tmp_path / "first")
        second = train(address, 24, tmp_path / "second")

    assert first[0] == first[1]
    assert second[0] == second[1]
    # The checkpoint is of step 12; what was trained after it is trained again.
    assert [row["progress"] for row in second[0]] == list(range(12, 24))
    again = {row["progress"]: row for row in second[0]}
    # Values below the resume point's horizon repeat bit for bit.
    for row in first[0][12:16]:
        repeated = again[row["progress"]]
        assert (repeated["lr"], repeated["weight_decay"]) == (row["lr"], row["weight_decay"])


@pytest.mark.parametrize("framework", ["accelerate", "huggingface", "lightning", "torch"])
def test_a_framework_resumes_from_its_own_checkpoint(
    root: Path,
    tmp_path: Path,
    serving: Callable[[list[str]], AbstractContextManager[tuple[str, str]]],
    framework: str,
) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(SPEC)

    def train(address: str, steps: int) -> str:
        command = [sys.executable, os.fspath(root / f"examples/train_{framework}.py")]
        command += ["--server", address, "--spec", os.fspath(spec), "--steps", str(steps)]
        command += ["--save-every", "4", "--out", os.fspath(tmp_path / "out")]
        done = subprocess.run(
            command, env=_environment(tmp_path), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    with serving([sys.executable, "-m", "lrpilot.server.cli"]) as (address, _):
        # A quarter of the peak more each step, four steps long; then the policy has not acted yet.
        assert "4 updates made; the last one used LR 0.00075" in train(address, 4)
        assert "6 updates made; the last one used LR 0.001" in train(address, 6)


@pytest.mark.parametrize(
    ("framework", "ends"),
    # A quarter of the peak more each step, four steps long.
    [
        ("deepspeed", ["the last one used LR 0.00025", "the last one used LR 0.0005"]),
        ("torchtitan", ["the next one has LR 0.0005", "the next one has LR 0.00075"]),
    ],
)
def test_two_ranks_resume_from_the_checkpoint_of_their_framework(
    root: Path,
    tmp_path: Path,
    serving: Callable[[list[str]], AbstractContextManager[tuple[str, str]]],
    framework: str,
    ends: list[str],
) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(SPEC)

    def train(address: str, steps: int) -> str:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
        command += [os.fspath(root / f"examples/train_{framework}.py"), "--server", address]
        command += ["--spec", os.fspath(spec), "--steps", str(steps)]
        command += ["--save-every", "2", "--out", os.fspath(tmp_path / "out")]
        done = subprocess.run(
            command, env=_environment(tmp_path), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    with serving([sys.executable, "-m", "lrpilot.server.cli"]) as (address, _):
        for steps, end in zip((2, 3), ends, strict=True):
            assert f"{steps} updates made; {end}\n" in train(address, steps)


def test_megatron_core_resumes_from_its_checkpoint(
    root: Path,
    tmp_path: Path,
    serving: Callable[[list[str]], AbstractContextManager[tuple[str, str]]],
) -> None:
    def train(address: str, steps: int) -> list[str]:
        command = [sys.executable, os.fspath(root / "examples/train_megatron.py")]
        command += ["--server", address, "--steps", str(steps), "--out", os.fspath(tmp_path)]
        done = subprocess.run(
            command, env=_environment(tmp_path), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()

    with serving([sys.executable, "-m", "lrpilot.server.cli"]) as (address, _):
        # The warmup: a twentieth of the peak each iteration of 8 samples.
        for steps, first, last in ((4, "8 samples", "32 samples"), (6, "40 samples", "48 samples")):
            lines = train(address, steps)
            assert lines[0].startswith(first)
            assert lines[-1].startswith(last)
            assert lines[-1].endswith(f"next LR {steps * 1.5e-4:.3e}")


def test_the_fp8_example_shows_what_it_says(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, os.fspath(root / "examples/train_fp8.py"), "--steps", "16"]
    done = subprocess.run(
        command,
        env=_environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, *_, losses, values = done.stdout.splitlines()
    assert "FP8 is emulated by casts" in first or "CUDA graph" in first
    assert losses == "the server has all 16 losses, equal by =="
    assert values.endswith("were those of lrpilot curve at all 16 steps, by ==")
    left = [entry.name for entry in tmp_path.iterdir()]
    assert [name for name in left if not name.startswith("torchinductor_")] == []  # torch's own
    assert _processes_that_name(tmp_path) == []


def test_the_fp8_example_multiplies_with_the_kernel_as_it_does_by_casts(root: Path) -> None:
    """torch has torch._scaled_mm for the CPU as well: the same layouts, types and scales."""
    program = """
import torch
import train_fp8 as example

torch.manual_seed(0)
weight = torch.randn(384, 128) / 11

def run(with_kernel):
    example.HAS_FP8 = with_kernel
    torch.manual_seed(1)
    x = torch.randn(512, 128).to(torch.bfloat16).requires_grad_()
    held = weight.clone().requires_grad_()
    out = example.FP8Matmul.apply(x, held)
    # Numbers of bfloat16, so that both round the same gradient to FP8.
    out.backward(torch.randn(512, 384).to(torch.bfloat16).to(out.dtype))
    return out, x.grad, held.grad

example.DTYPE = torch.bfloat16
for mine, theirs in zip(run(True), run(False), strict=True):
    off = (mine.float() - theirs.float()).abs().max() / theirs.float().abs().max()
    assert off <= 2.0**-8, off
print("the same")
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=root / "examples",
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.stdout == "the same\n", done.stderr
