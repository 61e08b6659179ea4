"""How fast the server and clone_voice.py say one sentence with the embedded stand-in, on the same two CPU cores.

    .venv/bin/python serving/benchmark.py --turns 5

It prints a table: medians over the turns, in brackets the least and the most. In each turn every row has one request,
since other programs may use the cores; a first turn warms up. Loading is not counted, nor is preparing the recording:
both are given its samples at 24 kHz, every turn others, since the engine remembers.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from server import Server
from test_served import ANNA, BEN, ENCODER, FRAME, RATE, STANDIN, TEXT, data_url, speech
from torch import Tensor

import clone_voice
import inject_encoder
import patch_tokenizer
from voxtral.tts import TTS, named_voice

MAX_FRAMES = 100
CORES = 2


def of_server(server: Server, **voice) -> tuple[float, float]:
    """-> seconds until the first audio, seconds per second of audio"""
    answer = server.speak(TEXT, response_format="pcm", stream=True, stream_format="audio", **voice)
    assert answer.status == 200, answer.body
    return answer.first_sec, answer.seconds / (len(answer.body) / 2 / RATE)


def of_clone_voice(tts: TTS, waveform: Tensor | None, turn: int) -> tuple[float, float]:
    """The same; waveform: [1, 1, T] of a reference, or None for the registered voice. turn: the seed"""
    started, first, n_samples = time.perf_counter(), None, 0
    voice = named_voice(tts.folder, "anna") if waveform is None else tts.codec.voice_embedding(waveform).bfloat16()
    pieces = [clone_voice.Piece(0, TEXT)]
    for _, samples in clone_voice.speak(tts, pieces, voice, turn, MAX_FRAMES, clone_voice.CFG_ALPHA):
        first = first or (len(samples) and time.perf_counter() - started)
        n_samples += len(samples)
    assert n_samples and n_samples % FRAME == 0
    return first, (time.perf_counter() - started) / (n_samples / RATE)


def cell(values: list[float], unit: str = "") -> str:
    return f"{statistics.median(values):.2f}{unit} [{min(values):.2f}, {max(values):.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=9, help="measured requests of every row (default: 9)")
    turns = parser.parse_args().turns
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])  # of the server as well
    torch.set_num_threads(CORES)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        inject_encoder.main(["--checkpoint", str(STANDIN), "--encoder", str(ENCODER), "--output", str(checkpoint)])
        patch_tokenizer.main(["--checkpoint", str(checkpoint), "--voice", f"anna={ANNA}"])
        tts, recording, measured = TTS.from_checkpoint(checkpoint), speech(BEN), []
        with Server(checkpoint, Path(folder) / "server.log") as server:
            for turn in range(turns + 1):
                reference = recording[turn:]
                measured.append(
                    {
                        "vLLM-Omni, registered voice": of_server(server, voice="anna"),
                        "`clone_voice.py --voice`": of_clone_voice(tts, None, turn),
                        "vLLM-Omni, `ref_audio`": of_server(server, ref_audio=data_url(reference)),
                        "`clone_voice.py --reference`": of_clone_voice(
                            tts, torch.from_numpy(reference)[None, None], turn
                        ),
                    }
                )
    print("\n| | first audio | real-time factor |\n| --- | --- | --- |")
    for name in measured[0]:
        first, factor = zip(*(turn[name] for turn in measured[1:]))
        print(f"| {name} | {cell(first, ' s')} | {cell(factor)} |")


if __name__ == "__main__":
    main()
