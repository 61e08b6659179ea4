"""How fast the server and clone_voice.py say one sentence with the embedded stand-in, on the same two CPU cores.

.venv/bin/python serving/benchmark.py prints a table: best of --repeats requests, one at a time, after one to warm up.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from server import Server
from test_served import ANNA, BEN, ENCODER, FRAME, RATE, STANDIN, TEXT, data_url, speech

import clone_voice
import inject_encoder
import patch_tokenizer
from voxtral.tts import TTS, named_voice
from voxtral.voices import encode_reference

MAX_FRAMES = 100


def of_server(server: Server, **fields) -> tuple[float, float, float]:
    """-> seconds until the first audio, until the last, and of audio"""
    answer = server.speak(TEXT, response_format="pcm", stream=True, stream_format="audio", **fields)
    assert answer.status == 200, answer.body
    return answer.first_sec, answer.seconds, len(answer.body) / 2 / RATE


def of_clone_voice(tts: TTS, make_voice: Callable) -> tuple[float, float, float]:
    """The same, from a loaded model on."""
    started, first, n_samples = time.perf_counter(), None, 0
    pieces = [clone_voice.Piece(0, TEXT)]
    for _, samples in clone_voice.speak(tts, pieces, make_voice(), 0, MAX_FRAMES, clone_voice.CFG_ALPHA):
        first = first or (len(samples) and time.perf_counter() - started)
        n_samples += len(samples)
    assert n_samples % FRAME == 0
    return first, time.perf_counter() - started, n_samples / RATE


def show(name: str, measure: Callable, repeats: int) -> None:
    runs = [measure() for _ in range(repeats + 1)][1:]
    first = min(first for first, _, _ in runs)
    factor = min(seconds / audio for _, seconds, audio in runs)
    print(f"| {name} | {first:.2f} s | {factor:.2f} | {runs[0][2]:.2f} s |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="measured requests of every kind (default: 3)")
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        inject_encoder.main(["--checkpoint", str(STANDIN), "--encoder", str(ENCODER), "--output", str(checkpoint)])
        patch_tokenizer.main(["--checkpoint", str(checkpoint), "--voice", f"anna={ANNA}"])
        print("\n| | first audio | real-time factor | audio |\n| --- | --- | --- | --- |")
        with Server(checkpoint, Path(folder) / "server.log") as server:
            show("vLLM-Omni, registered voice", lambda: of_server(server, voice="anna"), repeats)
            reference = data_url(speech(BEN))
            show("vLLM-Omni, `ref_audio`", lambda: of_server(server, ref_audio=reference), repeats)
        tts = TTS.from_checkpoint(checkpoint)
        show("`clone_voice.py --voice`", lambda: of_clone_voice(tts, lambda: named_voice(checkpoint, "anna")), repeats)
        show(
            "`clone_voice.py --reference`",
            lambda: of_clone_voice(tts, lambda: encode_reference(tts.codec, BEN)[0].bfloat16()),
            repeats,
        )


if __name__ == "__main__":
    main()
