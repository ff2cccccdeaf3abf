"""Feeds damaged files to everything that reads files: `python tests/faults/fuzz.py`.

Inputs are real files of each kind, damaged byte by byte (bits flipped, parts cut out, doubled,
swapped, strange words put in) or, where they have a structure, value by value. A reader may take
an input or refuse it by a message for the user; it fails if it raises anything else, needs more
than a second of processor time, or leaves a file outside its folder.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import io
import json
import os
import random
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import made_up  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from omegaconf.errors import OmegaConfBaseException  # noqa: E402
from PIL import Image  # noqa: E402

from clbench import checkpoint, config, image_files, results, userspace  # noqa: E402
from clbench.discretion import refuse_environment  # noqa: E402
from clbench.errors import UserError  # noqa: E402
from clbench.search import Space  # noqa: E402
from clbench.study import Study  # noqa: E402
from clbench.text import instruction_files  # noqa: E402
from clbench.types import Scenario, Strategy  # noqa: E402

#: Words that readers have stumbled over somewhere.
WORDS = [
    *(b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"null", b"true", b"{}", b"[]", b'""', b"\\"),
    *(
        b"[" * 3000,
        b'{"a":' * 3000,
        b"\\ud800",
        b"\xff\xfe",
        b"\x00",
        b"\xef\xbb\xbf",
        b"\n",
        b": ",
    ),
    *(
        b"&a [*a]",
        b"!!python/object/apply:os.mkdir [canary]",
        b"${oc.env:HOME}",
        b"${a}",
        b"<<: *a",
    ),
    *(b"../../canary", b"/tmp/canary", b"<script>", b"\xe2\x80\xae", b"-", b"_target_: os.system"),
]
VALUES = [
    *(None, True, -1, 0, 10**400, 1e308, float("nan"), float("inf"), "", "x" * 5000, "\ud800"),
    *(
        [],
        {},
        [[]],
        [None],
        {"": ""},
        "../../canary",
        "${oc.env:HOME}",
        "os.system",
        {"a": {"b": 1}},
    ),
]
#: Seconds of processor time that one input may take.
PATIENCE = 1.0

Reader = Callable[[bytes, Path], None]


class Hangs(BaseException):
    """A reader that takes too long."""


def damaged(data: bytes, dice: random.Random) -> bytes:
    """The same bytes with one to four faults."""
    found = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        place, length = dice.randrange(len(found) + 1), int(dice.expovariate(1 / 20)) + 1
        part = found[place : place + length]
        kind = dice.randrange(6)
        if kind == 0 and found:
            found[min(place, len(found) - 1)] ^= 1 << dice.randrange(8)
        elif kind == 1:
            del found[place : place + length]
        elif kind == 2:
            found[place:place] = part * dice.randint(1, 3)
        elif kind == 3:
            found[place:place] = dice.choice(WORDS)
        elif kind == 4:
            found[place : place + length] = dice.choice(WORDS)
        else:
            other = dice.randrange(len(found) + 1)
            found[other : other + length], found[place : place + length] = part, bytes(part)
        if dice.random() < 0.02:
            del found[place:]
    return bytes(found)


def changed(tree: Any, dice: random.Random) -> Any:
    """The same plain data with one to three values, or keys, that are others."""
    found = copy.deepcopy(tree)
    for _ in range(dice.randint(1, 3)):
        places = list(_places(found))
        if not places:
            return dice.choice(VALUES)
        inside, key = dice.choice(places)
        kind = dice.randrange(4)
        if kind == 0:
            del inside[key]
        elif kind == 1 and isinstance(inside, dict):
            inside[dice.choice(["", "x", "schema", "../x", "_target_", "ſeed"])] = inside.pop(key)
        else:
            inside[key] = copy.deepcopy(dice.choice(VALUES))
    return found


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key in (
        tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    ):
        yield tree, key
        yield from _places(tree[key])


def read_result(data: bytes, folder: Path) -> None:
    """As a report reads a run folder, and as the run itself finds it."""
    (folder / "result.json").write_bytes(data)
    found = results._opened(folder)
    if found.result is not None:
        found.result.to_json()
    run = results.RunFolder(folder, "x")
    run.path = folder
    run.result()


def read_study(data: bytes, folder: Path) -> None:
    """As a report reads a tuning record."""
    (folder / "study.json").write_bytes(data)
    try:
        Study.from_json((folder / "study.json").read_text())
    except (OSError, ValueError, RecursionError):
        return


def read_configuration(data: bytes, folder: Path) -> None:  # noqa: ARG001
    """As the command line reads a YAML of the user's."""
    try:
        loaded = OmegaConf.create(data.decode(errors="replace"))
        refuse_environment(OmegaConf.to_container(loaded, resolve=False))
        tree = OmegaConf.to_container(loaded, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError):
        return  # which the command line explains
    except (ValueError, TypeError, AssertionError, AttributeError, RecursionError):
        return  # OmegaConf's own, before anything of ours
    if isinstance(tree, dict):
        kind: Any = Scenario if "scenarios" in str(tree.get("_target_")) else Strategy
        built = config.build(tree, kind, "node")
        config.options(built)
        if isinstance(built, Strategy):
            Space(tree)


def read_instructions(data: bytes, folder: Path) -> None:
    """As a scenario reads its tasks."""
    for name, within in (("a.jsonl", ""), ("a.json", ""), ("a.json", "Instances")):
        (folder / name).write_bytes(data)
        try:
            for item in instruction_files.read_items(folder / name, within):
                item.text("input")
                item.texts("output")
        except UserError:
            continue
    for read in (instruction_files.read_object, instruction_files.read_labels):
        try:
            read(folder / "a.json")
        except UserError:
            continue


def read_image(data: bytes, folder: Path) -> None:  # noqa: ARG001
    """As a folder of images is decoded."""
    for channels in (1, 3):
        found = image_files.decoded(data, channels, (8, 8))
        if not isinstance(found, str):
            assert found[0].shape == (channels, 8, 8)


def read_checkpoint(data: bytes, folder: Path) -> None:
    """As a run looks for where it was, the digest being right."""
    digest = hashlib.sha256(data).hexdigest()
    (folder / "x.state.pt").write_bytes(data)
    (folder / "state.sha256").write_text(f"{digest}  x.state.pt\n")
    checkpoint.load(folder, torch.device("cpu"))


def corpora() -> dict[str, tuple[Reader, Sequence[Any], int]]:
    """Readers, what they get before it is damaged (bytes, or plain data), and their share."""
    runs = [made_up.run(), made_up.adapted(), made_up.failed(made_up.run())]
    studies = [json.loads(made_up.study(trials=3).to_json())]
    nodes = [
        OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        for group in ("strategy", "scenario")
        for file in sorted((userspace.configuration() / group).glob("*.yaml"))
        if "defaults" not in file.read_text()
    ]
    items = [{"input": f"{i} +", "output": ["a", "b"]} for i in range(3)]
    texts = [items, {"Instances": items}, ["a", "b"]]
    lines = "\n".join(json.dumps(item) for item in items).encode()
    buffer = io.BytesIO()
    torch.save({"weights": torch.ones(4, 3), "plain": [1, "a", None, {"b": 2.0}]}, buffer)
    return {
        "result.json": (read_result, [made_up.plain(run) for run in runs], 35),
        "tuning record": (read_study, studies, 10),
        "YAML": (read_configuration, nodes, 20),
        "dataset JSON": (read_instructions, [*texts, lines], 15),
        "image": (read_image, list(pictures()), 15),
        "checkpoint": (read_checkpoint, [buffer.getvalue()], 5),
    }


def pictures() -> Iterator[bytes]:
    image = Image.effect_noise((12, 9), 50)
    for mode, kind in (
        ("RGB", "JPEG"),
        ("L", "JPEG"),
        ("RGB", "PNG"),
        ("P", "PNG"),
        ("RGBA", "PNG"),
    ):
        buffer = io.BytesIO()
        image.convert(mode).save(buffer, kind)
        yield buffer.getvalue()


def written(tree: Any, as_yaml: bool) -> bytes:
    if as_yaml:
        return yaml.dump(tree, allow_unicode=False).encode(errors="replace")
    return json.dumps(tree).encode()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60, help="no input after that")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    userspace.join(userspace.suite())
    signal.signal(signal.SIGPROF, _too_long)
    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        tried, refused, faults = fuzz(Path(folder), arguments)
    for kind, count in tried.items():
        sys.stdout.write(f"{kind}: {count:,} inputs, {refused[kind]:,} refused by a message\n")
    sys.stdout.write(f"{sum(tried.values()):,} inputs; faults: {len(faults)}\n")
    for text, example in list(faults.items())[:20]:
        sys.stdout.write(f"{text}\n    {example[:200]!r}\n")
    return 1 if faults else 0


def fuzz(
    root: Path, arguments: argparse.Namespace
) -> tuple[Counter[str], Counter[str], dict[str, bytes]]:
    """Tries all inputs; returns how many of each kind, how many were refused, and the faults."""
    dice = random.Random(arguments.seed)
    tried, refused, faults = Counter[str](), Counter[str](), {}
    kinds = corpora()
    inside = root / "inside"
    inside.mkdir()
    os.chdir(inside)
    names, shares = list(kinds), [share for _, _, share in kinds.values()]
    began = os.times().elapsed
    for _ in range(arguments.inputs):
        if os.times().elapsed - began > 60 * arguments.minutes:
            break
        kind = dice.choices(names, shares)[0]
        reader, seeds, _ = kinds[kind]
        data = one_input(dice.choice(seeds), kind == "YAML", dice)
        tried[kind] += 1
        try:
            signal.setitimer(signal.ITIMER_PROF, PATIENCE)
            reader(data, inside)
        except UserError:
            refused[kind] += 1
        except (Exception, Hangs):
            signal.setitimer(signal.ITIMER_PROF, 0)
            faults.setdefault(f"{kind}: {_place(sys.exc_info()[1])}", data)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        if tried.total() % 500 == 0 and os.listdir(root) != ["inside"]:
            faults.setdefault(f"{kind}: it left {os.listdir(root)}", data)
    if Path("canary").exists() or Path("/tmp/canary").exists():
        faults["the canary is there"] = b""
    os.chdir("/")
    return tried, refused, faults


def _place(error: BaseException | None) -> str:
    """What was raised, and the last line of the suite on the way there."""
    assert error is not None
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/clbench/" in f.filename or "/strategies/" in f.filename]
    where = (ours or frames)[-1]
    return f"{type(error).__name__} in {Path(where.filename).name}:{where.lineno} {where.line}"


def one_input(seed: Any, as_yaml: bool, dice: random.Random) -> bytes:
    if isinstance(seed, bytes):
        return damaged(seed, dice)
    kind = dice.random()
    tree = changed(seed, dice) if kind < 0.7 else seed
    data = written(tree, as_yaml)
    return damaged(data, dice) if kind > 0.5 else data


def _too_long(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    raise Hangs(f"more than {PATIENCE} s")


def _memory() -> str | None:
    """A disk in memory, where there is one."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


if __name__ == "__main__":
    sys.exit(main())
