"""Damaged files against every door that files come in by: python tests/fuzz.py --count 5000 --seed 0

Each case is a good small file (audio in a dozen formats, safetensors, .pt, .npy, JSON, tables) with a damaged header. A
door reads it or refuses it in its own words; any other exception, a hang of 10 s (twice), a crash, a line on stderr or
a file outside the case's folder is a finding. Prints a table, and the findings; exits with 1 when there is one.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import soundfile
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from voxtral.audio import BadClip, load_segment, read_header
from voxtral.checkpoint import SafetensorsFile, save_tensors
from voxtral.errors import UserError
from voxtral.json_files import read_json
from voxtral.known_codes import read_codes
from voxtral.params import load_params, parse_params
from voxtral.reference import prepare_reference
from voxtral.remarks import Remarks
from voxtral.standin import small_params
from voxtral.tables import read_table
from voxtral.voices import load_embedding

HANG_SEC = 10
MEMORY_BYTES = 6 * 2**30  # address space of a worker beyond what it starts with
AUDIO = {
    "wav": ("WAV", "PCM_16", 1),
    "float.wav": ("WAV", "FLOAT", 2),
    "wavex.wav": ("WAVEX", "PCM_24", 2),
    "adpcm.wav": ("WAV", "MS_ADPCM", 1),
    "rf64": ("RF64", "PCM_16", 1),
    "w64": ("W64", "PCM_16", 1),
    "flac": ("FLAC", "PCM_16", 1),
    "ogg": ("OGG", "VORBIS", 1),
    "opus": ("OGG", "OPUS", 1),
    "mp3": ("MP3", None, 1),
    "aiff": ("AIFF", "PCM_16", 1),
    "au": ("AU", "PCM_16", 1),
    "caf": ("CAF", "PCM_16", 1),
}
N_ROWS = 20
NUMBERS = [0, 1, 2, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**62, 2**64 - 1]
WORDS = [b"null", b"-1", b"1e999", b"[", b"]", b"{", b"}", b'"', b",", b"[]", b"{}", b"true", b"\\ud800", b"\0"]
WORDS += [b"\xff", b"\n", b"\xe2\x80\xa8", b"9" * 20, b"[" * 2000, b"\t", b"|", b";", b"../../../x", b"NaN"]
OUTCOMES = ("read", "refused", "finding")


def good_files(folder: Path) -> dict[str, bytes]:
    """Kind -> the bytes of a good file."""
    files, time_sec = {}, np.arange(int(1.3 * 24000)) / 24000
    sound = (0.3 * np.sin(2 * np.pi * 220 * time_sec) * (0.6 + 0.4 * np.sin(20 * time_sec))).astype(np.float32)
    for name, (container, subtype, channels) in AUDIO.items():
        path = folder / f"good.{name}"
        soundfile.write(path, np.repeat(sound[:, None], channels, 1), 24000, subtype, format=container)
        files[name] = path.read_bytes()
    params = parse_params(small_params())
    embedding = torch.randn(N_ROWS, params.dim, generator=torch.Generator().manual_seed(0))
    save_tensors(folder / "good.safetensors", {"voice": embedding.bfloat16()})
    torch.save(embedding.bfloat16(), folder / "good.pt")
    torch.save(embedding.bfloat16(), folder / "good.old.pt", _use_new_zipfile_serialization=False)
    np.save(folder / "good.npy", np.zeros((params.codec.n_codebooks, 12), np.int16))
    (folder / "good.params.json").write_text(json.dumps(small_params()))
    (folder / "good.jsonl").write_text(
        "".join(json.dumps({"path": f"{i}.wav", "speaker": "a", "text": "Hello"}) + "\n" for i in range(5))
    )
    (folder / "good.csv").write_text('path,speaker,text\na.wav,anna,"Yes, please"\nb.wav,ben,No\nc.wav,,"two\nlines"\n')
    (folder / "good.tsv").write_text('client_id\tpath\tsentence\nabc\ta.mp3\tHello\ndef\tb.mp3\t"No\n')
    for name in ("safetensors", "pt", "old.pt", "npy", "params.json", "jsonl", "csv", "tsv"):
        files[name] = (folder / f"good.{name}").read_bytes()
    return files


def damaged(content: bytes, random: np.random.Generator) -> bytes:
    """One to four changes, most of them in the first bytes, where headers are."""
    data = bytearray(content)
    for _ in range(random.integers(1, 5)):
        reach = max(1, len(data) if random.random() < 0.2 else min(len(data), int(random.choice([16, 64, 256]))))
        at = int(random.integers(reach))
        match int(random.integers(9)):
            case 0:
                data[at : at + 1] = bytes([random.integers(256)])
            case 1:
                data[at : at + 1] = bytes([(data[at] if at < len(data) else 0) ^ (1 << int(random.integers(8)))])
            case 2 | 3:
                size, order = int(random.choice([2, 4, 8])), str(random.choice(["little", "big"]))
                value = int(NUMBERS[random.integers(len(NUMBERS))]) % 2 ** (8 * size)
                data[at : at + size] = value.to_bytes(size, order)
            case 4:
                del data[int(random.integers(len(data) + 1)) :]
            case 5:
                del data[at : at + int(random.integers(1, 32))]
            case 6:
                data[at:at] = data[at : at + int(random.integers(1, 64))]
            case 7:
                data[at:at] = WORDS[random.integers(len(WORDS))]
            case 8:
                data += random.bytes(int(random.integers(1, 2000)))
    return bytes(data)


def doors(kind: str, path: Path, params, end_row: torch.Tensor):
    """What reads files of this kind, as functions without arguments."""
    if kind in AUDIO:
        return [
            lambda: read_header(path),
            *(lambda position=position: load_segment(str(path), position, 0.5) for position in (0.0, 0.4, 0.99)),
            lambda: prepare_reference(path),
        ]
    if kind == "safetensors":
        return [lambda: SafetensorsFile(path).read(), lambda: load_embedding(path, params, end_row)]
    if kind in ("pt", "old.pt"):
        return [lambda: load_embedding(path, params, end_row)]
    if kind == "npy":
        return [lambda: read_codes(str(path), params.codec)]
    if kind == "params.json":
        return [lambda: load_params(path.parent), lambda: read_json(path)]
    return [lambda: list(read_table(path, Remarks()))]


def work(cases: list[int], seed: int, folder: Path, files: dict[str, bytes], current, results) -> None:
    """Tries cases; (case, kind, outcome, details) go to `results`."""
    warnings.simplefilter("ignore")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    inside = folder / "case"
    inside.mkdir(exist_ok=True)
    os.chdir(inside)
    log = os.open(folder / "stderr", os.O_CREAT | os.O_RDWR | os.O_TRUNC)
    os.dup2(log, 2)
    params, kinds = parse_params(small_params()), list(files)
    end_row = torch.ones(params.dim)
    for case in cases:
        current[0], current[1] = case, time.time()
        random = np.random.default_rng((seed, case))
        kind = kinds[case % len(kinds)]
        path = inside / ("params.json" if kind == "params.json" else f"case.{kind}")
        path.write_bytes(damaged(files[kind], random))
        outcome, details = "read", ""
        for door in doors(kind, path, params, end_row):
            try:
                door()
            except (UserError, BadClip) as error:
                outcome = "refused"
                if not str(error).strip() or "\n" in str(error):
                    outcome, details = "finding", f"no sentence: {error!r}"
                    break
            except BaseException:
                outcome, details = "finding", traceback.format_exc()
                break
        path.unlink()
        others = [str(one) for one in folder.rglob("*") if one.name not in ("case", "stderr")]
        if others:
            outcome, details = "finding", f"left files: {others}"
        if os.lseek(log, 0, os.SEEK_CUR):
            os.lseek(log, 0, os.SEEK_SET)
            outcome, details = "finding", f"on stderr: {os.read(log, 2000)!r}"
            os.lseek(log, 0, os.SEEK_SET)
            os.ftruncate(log, 0)
        results.put((case, kind, outcome, details))
    current[0] = -1


def run(count: int, seed: int) -> tuple[Counter, list[str]]:
    """-> (kind, outcome) -> how often, and the findings."""
    base = Path(tempfile.mkdtemp())
    try:
        (base / "good").mkdir()
        files = good_files(base / "good")
        context = multiprocessing.get_context("fork")
        counts, findings, todo, hung = Counter(), [], list(range(count)), set()
        while todo:
            current, results = context.Array("d", [todo[0], time.time()]), context.SimpleQueue()
            (base / "work").mkdir(exist_ok=True)
            process = context.Process(target=work, args=(todo, seed, base / "work", files, current, results))
            process.start()
            done, hang = set(), False
            while process.is_alive() or not results.empty():
                while not results.empty():
                    case, kind, outcome, details = results.get()
                    done.add(case)
                    counts[kind, outcome] += 1
                    if outcome == "finding":
                        findings.append(f"case {case} ({kind}): {details}")
                if current[0] >= 0 and time.time() - current[1] > HANG_SEC and process.is_alive():
                    hang = True
                    process.kill()
                process.join(0.02)
            todo = [case for case in todo if case not in done]
            if hang and todo and todo[0] not in hung:  # once more: a busy machine can stand still as long
                hung.add(todo[0])
            elif todo:  # the first of these is what it died of
                kind = list(files)[todo[0] % len(files)]
                counts[kind, "finding"] += 1
                findings.append(f"case {todo[0]} ({kind}): {'hangs' if hang else f'crashes ({process.exitcode})'}")
                todo = todo[1:]
            shutil.rmtree(base / "work")
        return counts, findings
    finally:
        shutil.rmtree(base, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000, help="damaged files (default: 5000)")
    parser.add_argument("--seed", type=int, default=0, help="of the damage (default: 0)")
    options = parser.parse_args()
    counts, findings = run(options.count, options.seed)
    row = "{:<12} {:>6} {:>8} {:>8}".format
    print(row("kind", "read", "refused", "findings"))
    for kind in dict.fromkeys(kind for kind, _ in counts):
        print(row(kind, *(counts[kind, outcome] for outcome in OUTCOMES)))
    totals = [sum(n for (_, one), n in counts.items() if one == outcome) for outcome in OUTCOMES]
    print(row("total", *totals))
    print("\n".join(findings))
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
