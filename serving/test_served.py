"""make serve-test: the embedded stand-in, with its encoder injected, in the real vLLM-Omni on two CPU cores.

Three servers: as deployed, in bf16, which stays to the end; beside it one in fp32 with the noise of clone_voice.py and
a LoRA merged, then one without an encoder. What they compute on the way is recorded by cpu_worker.py.
"""

import base64
import io
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from server import VENV, Answer, Server
from torch import Tensor

import clone_voice
import inject_encoder
import patch_tokenizer
from voxtral.acoustic import AcousticTransformer
from voxtral.backbone import Backbone
from voxtral.clones import adapted
from voxtral.codec import VoxtralCodec
from voxtral.reference import prepare_reference
from voxtral.tts import TTS, Request, named_voice, noise

ROOT = Path(__file__).parents[1]
STANDIN, ENCODER = ROOT / "assets" / "standin", ROOT / "assets" / "standin_withheld_encoder.safetensors"
ANNA, BEN = (ROOT / "assets" / "speech" / "talk" / f"{name}_00.opus" for name in ("w_f391", "w_m390"))
TEXT = "Julia and Anna will paint the white boxes on Friday."
RATE, FRAME = 24000, 1920
SHORT = 10  # frames, where it is not the speech that counts
MAX_FRAMES = 60  # of TEXT; the stand-in ends before
TABLE = []  # of what the servers answered


@pytest.fixture(scope="module", autouse=True)
def environment():
    if not (VENV / ".ready").is_file():
        pytest.skip("vLLM-Omni could not be installed into .venv-serve: what stopped it stands above.")
    yield
    row = "{:<10} {:<34} {:>6} {:>8} {:>9} {:>9}  {}".format
    print("\n\n" + row("server", "request", "answer", "audio s", "first s", "all s", "checked"))
    for line in TABLE:
        print(row(*line))


# ---------------------------------------------------------------- what is sent, what comes back


def data_url(samples: np.ndarray, container="WAV", subtype=None, mime="audio/wav") -> str:
    """samples [T] or [T, channels], in 16 bits unless subtype says something else"""
    file = io.BytesIO()
    samples = samples if subtype else (32767 * samples).round().astype(np.int16)  # containers would scale differently
    soundfile.write(file, samples, RATE, format=container, subtype=subtype)
    return f"data:{mime};base64,{base64.b64encode(file.getvalue()).decode()}"


def speech(path: Path) -> np.ndarray:
    """A recording as prepare_reference() leaves it, [T] float32"""
    return prepare_reference(path).waveform[0, 0].numpy()


def samples_of(answer: Answer) -> np.ndarray:
    """Audio as the server sent it, [T] int16"""
    samples, rate = soundfile.read(io.BytesIO(answer.body), dtype="int16")
    assert rate == RATE and samples.ndim == 1
    return samples


def ask(name: str, server: Server, request: str, checked: str, text=TEXT, **fields) -> Answer:
    """Sends a request and adds its row to the table."""
    answer = server.speak(text, **fields)
    audio = ""
    if answer.status == 200 and fields.get("response_format") != "pcm":
        audio = f"{len(samples_of(answer)) / RATE:.2f}"
    TABLE.append((name, request, answer.status, audio, f"{answer.first_sec:.1f}", f"{answer.seconds:.1f}", checked))
    return answer


def recorded(folder: Path, kind: str) -> list[dict]:
    """What the engine wrote down: of every `encode` or `prompt`, in order"""
    paths = sorted(folder.glob(f"{kind}_*.pt"), key=lambda path: int(path.stem.rpartition("_")[2]))
    return [torch.load(path) for path in paths]


def frames(folder: Path, request: int) -> dict[str, Tensor]:
    """hidden [N, dim], noise [N, 36] and ids [N, 37] of a request's frames"""
    found = [torch.load(path) for path in sorted(folder.glob(f"frame_{request}_*.pt"))]
    return {key: torch.cat([frame[key] for frame in found]) for key in found[0]}


def codes_of(ids: Tensor) -> Tensor:
    """Frames [N, 37] -> codes [37, L] before END_AUDIO, which must be the last if it is there"""
    ends = (ids[:, 0] == 1).nonzero().flatten().tolist()
    assert not ends or ends == [len(ids) - 1]
    return ids[: len(ids) - len(ends)].T - 2


def check_audio(samples: np.ndarray, ids: Tensor, checkpoint: Path) -> None:
    """samples [T] int16 of a bf16 server: what our fp32 decoder makes of its frames [N, 37], but for rounding"""
    with torch.no_grad():
        ours = VoxtralCodec.from_checkpoint(checkpoint).decode(codes_of(ids)[None])[0, 0].numpy()
    assert len(samples) == len(ours) and np.abs(ours).max() > 0.02
    assert np.linalg.norm(samples / 32768 - ours) < 0.03 * np.linalg.norm(ours)


# ---------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def clone(environment, tmp_path_factory) -> Path:
    """The stand-in with its encoder, made by inject_encoder.py, and the voice anna, made by patch_tokenizer.py"""
    folder = tmp_path_factory.mktemp("clone") / "checkpoint"
    inject_encoder.main(["--checkpoint", str(STANDIN), "--encoder", str(ENCODER), "--output", str(folder)])
    patch_tokenizer.main(["--checkpoint", str(folder), "--voice", f"anna={ANNA}"])
    return folder


@pytest.fixture(scope="module")
def adapter(environment, tmp_path_factory) -> Path:
    """A random LoRA, small enough to leave the speech alive"""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model = get_peft_model(
        Backbone.from_checkpoint(STANDIN, dtype=torch.float32).model,
        LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clone_with_lora(adapter, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "checkpoint"
    inject_encoder.main(
        ["--checkpoint", str(STANDIN), "--encoder", str(ENCODER), "--lora", str(adapter), "--output", str(folder)]
    )
    patch_tokenizer.main(["--checkpoint", str(folder), "--voice", f"anna={ANNA}"])
    return folder


# ---------------------------------------------------------------- as deployed


@pytest.fixture(scope="module")
def deployed(clone, tmp_path_factory):
    """-> the server, the folder of its records; the first three requests are a preset, anna, and ben's recording."""
    record = tmp_path_factory.mktemp("deployed")
    with Server(clone, record / "server.log", record) as server:
        answers = [
            ask("bf16", server, "preset", "ends by itself", voice="casual_male"),
            ask("bf16", server, "registered voice", "levels within one of ours", voice="anna"),
            ask("bf16", server, "ref_audio, WAV", "levels within one of ours", ref_audio=data_url(speech(BEN))),
        ]
        yield server, record, answers


def test_it_speaks_whole_frames_and_ends_by_itself(deployed, clone):
    _, record, answers = deployed
    for request, answer in enumerate(answers):
        samples, ids = samples_of(answer), frames(record, request)["ids"]
        assert ids[-1, 0] == 1 and 20 < len(ids) < MAX_FRAMES
        check_audio(samples, ids, clone)


def test_codes_and_rows_of_the_reference_are_a_bf16_computation_of_ours(deployed, clone):
    codec, (served,) = VoxtralCodec.from_checkpoint(clone), recorded(deployed[1], "encode")[:1]
    waveform = torch.from_numpy(speech(BEN))[None, None]
    assert (served["waveform"].float() - waveform).abs().max() < 2**-8  # 16-bit WAV, then bf16
    assert torch.equal(codec.quantizer.encode(served["latent"]), served["codes"])
    ours = codec.encode(served["waveform"])
    assert (ours - served["codes"])[:, 1:].abs().max() <= 1 and (ours == served["codes"]).float().mean() > 0.98
    n_frames = torch.tensor([served["codes"].shape[-1]])
    rows = VoxtralCodec.from_checkpoint(STANDIN).voice_rows(served["codes"], n_frames)[0].bfloat16()
    assert torch.equal(rows, served["rows"])  # END_AUDIO last; the table is what it was before injection
    prompt = recorded(deployed[1], "prompt")[2]["embeddings"]
    assert torch.equal(prompt[2 : 2 + len(rows)], rows)


def test_the_registered_voice_is_what_serving_makes_of_the_recording(deployed, clone):
    server, record, _ = deployed
    before = len(recorded(record, "encode"))
    reference = data_url(speech(ANNA), subtype="FLOAT")
    ask("bf16", server, "ref_audio, anna's recording", "rows are anna's", ref_audio=reference, max_new_tokens=SHORT)
    rows, voice = recorded(record, "encode")[before]["rows"], named_voice(clone, "anna")
    assert rows.shape == voice.shape and rows.dtype == voice.dtype and torch.equal(rows[-1], voice[-1])
    # A level that attention's rounding turned moves a row a little, another semantic code much; another table, all.
    cosine = torch.cosine_similarity(rows.float(), voice.float())
    assert cosine.median() > 0.99 and cosine.mean() > 0.97


def test_levels_of_all_frames_are_within_one_of_ours(deployed, clone):
    acoustic = AcousticTransformer.from_checkpoint(clone, dtype=torch.bfloat16)
    for request in range(3):
        served = frames(deployed[1], request)
        ours = acoustic.frame(served["hidden"], served["noise"])
        assert torch.equal(ours[:, 0], served["ids"][:, 0])
        assert (ours - served["ids"]).abs().max() <= 1 and (ours == served["ids"]).float().mean() > 0.9


def prompts_of(deployed, request: str, checked: str, **fields) -> Tensor:
    """-> embeddings of the prompt of one more request"""
    server, record, _ = deployed
    assert ask("bf16", server, request, checked, max_new_tokens=SHORT, **fields).status == 200
    return recorded(record, "prompt")[-1]["embeddings"]


def test_names_in_upper_case_and_a_voice_beside_a_reference_are_the_voice(deployed):
    anna = recorded(deployed[1], "prompt")[1]["embeddings"]
    assert torch.equal(prompts_of(deployed, "registered voice, ANNA", "prompt is anna's", voice="ANNA"), anna)
    both = dict(voice="anna", ref_audio=data_url(speech(BEN)))
    assert torch.equal(prompts_of(deployed, "voice and ref_audio", "prompt is anna's", **both), anna)


@pytest.mark.parametrize("request_name, seconds", [("FLAC", None), ("Opus", None), ("0.2 s", 0.2), ("30 s", 30)])
def test_references_of_other_formats_and_lengths(deployed, request_name, seconds):
    samples = speech(BEN)
    if request_name == "Opus":
        url = "data:audio/ogg;base64," + base64.b64encode(BEN.read_bytes()).decode()
        samples, rate = soundfile.read(BEN, dtype="float32")
        assert rate == RATE
    elif request_name == "FLAC":
        url = data_url(samples, "FLAC", mime="audio/flac")
    else:
        samples = np.resize(samples, round(seconds * RATE))
        url = data_url(samples)
    n_rows = math.ceil(len(samples) / FRAME) + 1
    prompt = prompts_of(deployed, f"ref_audio, {request_name}", f"{n_rows} rows", ref_audio=url)
    if request_name == "FLAC":  # the samples of the WAV, which the engine knows again and does not encode twice
        assert torch.equal(prompt, recorded(deployed[1], "prompt")[2]["embeddings"])
    else:
        encoded = recorded(deployed[1], "encode")[-1]
        assert (encoded["waveform"][0, 0].float() - torch.from_numpy(samples)).abs().max() < 2**-8
        assert len(encoded["rows"]) == n_rows and torch.equal(prompt[2 : 2 + n_rows], encoded["rows"])


def test_streaming_sends_audio_before_it_is_all_there(deployed, clone):
    server, record, _ = deployed
    answer = ask(
        "bf16",
        server,
        "registered voice, streamed",
        "first byte early",
        voice="anna",
        response_format="pcm",
        stream=True,
        stream_format="audio",
    )
    ids = frames(record, len(recorded(record, "prompt")) - 1)["ids"]
    assert answer.status == 200
    check_audio(np.frombuffer(answer.body, "<i2"), ids, clone)
    assert answer.first_sec < 0.6 * answer.seconds


REFUSED = {
    "ref_audio, stereo": lambda: dict(ref_audio=data_url(np.stack([speech(BEN)] * 2, axis=1))),
    "unknown voice": lambda: dict(voice="nobody"),
    "neither voice nor ref_audio": dict,
    "ref_audio, no audio": lambda: dict(ref_audio="data:audio/wav;base64,AAAA"),
}


@pytest.mark.parametrize("request_name", REFUSED)
def test_what_is_refused_is_answered_400_and_the_engine_lives(deployed, request_name):
    server = deployed[0]
    assert ask("bf16", server, request_name, "engine lives", **REFUSED[request_name]()).status == 400
    assert server.speak(TEXT, voice="anna", max_new_tokens=SHORT).status == 200


# ---------------------------------------------------------------- in fp32, with the same noise, with a LoRA


@pytest.fixture(scope="module")
def exact(clone_with_lora, tmp_path_factory):
    """-> folder of the records, answers; requests: anna by name, ben's recording, anna with more guidance."""
    record = tmp_path_factory.mktemp("exact")
    torch.save(noise((0, 0), MAX_FRAMES, 36), record / "noise.pt")
    with Server(clone_with_lora, record / "server.log", record, fp32=True) as server:
        voices = {
            "registered voice": {"voice": "anna"},
            "ref_audio, WAV": {"ref_audio": data_url(speech(BEN), subtype="FLOAT")},
            "registered voice, cfg_alpha 2": {"voice": "anna", "extra_params": {"cfg_alpha": 2.0}},
        }
        return record, [
            ask(
                "fp32, LoRA", server, request, "codes and samples of clone_voice.py", **voice, max_new_tokens=MAX_FRAMES
            )
            for request, voice in voices.items()
        ]


@pytest.fixture(scope="module")
def ours(clone_with_lora) -> tuple[TTS, list[Request]]:
    """clone_voice.py's model and requests; the rows of the recording in fp32, as this server computes them"""
    tts = TTS.from_checkpoint(clone_with_lora)
    with torch.no_grad():
        codes = tts.codec.quantizer.encode(tts.codec.encode_latent(torch.from_numpy(speech(BEN))[None, None]))
        rows = tts.codec.voice_rows(codes)[0]
    anna = Request(TEXT, named_voice(clone_with_lora, "anna"), (0, 0))
    return tts, [anna, replace(anna, voice=rows), replace(anna, cfg_alpha=2.0)]


def test_fp32_reference_codes_and_rows_are_equal(exact, ours):
    (served,), rows = recorded(exact[0], "encode"), ours[1][1].voice
    assert served["codes"].dtype == torch.int64 and torch.equal(
        ours[0].codec.quantizer.encode(served["latent"]), served["codes"]
    )
    torch.testing.assert_close(rows, served["rows"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("request_number", [0, 1, 2])
def test_fp32_codes_are_equal_frame_by_frame(exact, ours, request_number):
    tts, request = ours[0], ours[1][request_number]
    prompt = recorded(exact[0], "prompt")[request_number]["embeddings"]
    torch.testing.assert_close(prompt, tts.prompt(TEXT, request.voice).float(), rtol=0, atol=1e-5)
    (take,) = tts.generate([request], MAX_FRAMES)
    served = frames(exact[0], request_number)["ids"]
    assert take.ended and served[-1, 0] == 1
    assert torch.equal(codes_of(served), take.codes)


@pytest.mark.parametrize("request_number", [0, 1, 2])
def test_fp32_audio_is_within_one_step_of_clone_voice(exact, ours, clone_with_lora, tmp_path, capsys, request_number):
    output, (tts, requests) = tmp_path / "ours.wav", ours
    request = requests[request_number]
    if request_number == 1:  # --reference would encode in bf16, as every server but this one
        clone_voice.write_all(tts, [output], [clone_voice.Piece(0, TEXT)], request.voice, 0, MAX_FRAMES)
    else:
        options = ["--voice", "anna", "--text", TEXT, "--cfg-alpha", str(request.cfg_alpha)]
        clone_voice.main(["--checkpoint", str(clone_with_lora), *options, "--output", str(output)])
    served, (wav, _) = samples_of(exact[1][request_number]), soundfile.read(output, dtype="int16")
    assert len(served) == len(wav) and np.abs(served.astype(int) - wav).max() <= 1
    assert np.abs(served.astype(int)).max() > 500


def test_fp32_lora_is_the_one_that_was_trained(exact, ours, clone, adapter):
    """The adapter merged by peft, among transformers' weights, says what the injected checkpoint says."""
    trained = adapted(TTS.from_checkpoint(clone), str(adapter))
    for parameter in trained.models.backbone.parameters():
        parameter.data.copy_(parameter.data.bfloat16())  # as injection rounds
    (take,) = trained.generate(ours[1][:1], MAX_FRAMES)
    assert torch.equal(codes_of(frames(exact[0], 0)["ids"]), take.codes)
    (without,) = TTS.from_checkpoint(clone).generate(ours[1][:1], MAX_FRAMES)
    assert not torch.equal(without.codes, take.codes)


# ---------------------------------------------------------------- without an encoder


def test_without_an_encoder_references_are_refused_and_presets_speak(environment, tmp_path):
    assert not any(
        re.match(r"audio_tokenizer\.(input_proj|encoder_blocks)\.", name)
        for name in load_file(STANDIN / "consolidated.safetensors")
    )
    with Server(STANDIN, tmp_path / "server.log") as server:
        answer = ask("no encoder", server, "ref_audio, WAV", "engine lives", ref_audio=data_url(speech(BEN)))
        assert answer.status == 400
        assert ask("no encoder", server, "preset", "speaks", voice="casual_male", max_new_tokens=SHORT).status == 200
