"""Registering voices: the three places, mistral_common's view of them, refusals, kills, and the script."""

import base64
import io
import json
import math
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import SPEECH, write_injected
from mistral_common.exceptions import InvalidRequestException
from mistral_common.protocol.speech.request import SpeechRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

import patch_tokenizer
from voxtral import voices
from voxtral.checkpoint import EMBEDDING_NAME, SafetensorsFile, save_tensors
from voxtral.codec import VoxtralCodec, codebook_offsets
from voxtral.evaluation import compare_voices, voice_statistics
from voxtral.params import END_AUDIO, CheckpointError, load_params, parse_params
from voxtral.reference import prepare_reference
from voxtral.remarks import Remarks
from voxtral.standin import random_tensor, small_params, write_random_checkpoint
from voxtral.tts import named_voice
from voxtral.voices import (
    VoiceError,
    encode_reference,
    end_audio_row,
    list_voices,
    load_embedding,
    preset_embeddings,
    register,
    remove,
    voice_files,
)

CLIP = SPEECH / "k_af_heart_0.opus"
PRESETS = {"alpha": 20, "beta": 30}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A checkpoint with an encoder, as inject_encoder.py leaves it."""
    return write_injected(tmp_path_factory.mktemp("pristine"), PRESETS)


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "checkpoint")


@pytest.fixture(scope="module")
def end_row(pristine):
    return end_audio_row(pristine)


def embedding(end_row, n_rows=40, seed=0):
    """[n_rows, dim] that ends on the END_AUDIO row."""
    rows = torch.randn(n_rows - 1, len(end_row), generator=torch.Generator().manual_seed(seed)) * 0.1
    return torch.cat([rows, end_row[None]]).bfloat16()


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def tokens_of(folder, **request):
    tokenizer = MistralTokenizer.from_file(folder / "tekken.json")
    return tokenizer.encode_speech_request(SpeechRequest(input="the cat", **request)).tokens, tokenizer


# ---------------------------------------------------------------- the three places


def test_a_new_voice_stands_in_all_three_places_and_nothing_else_changes(folder, end_row):
    before = contents(folder)
    voice = embedding(end_row)
    assert register(folder, "anna", voice, "anna.pt")
    assert load_params(folder).codec.voice == {"alpha": 0, "beta": 1, "anna": 2}
    tekken = json.loads((folder / "tekken.json").read_text())
    assert tekken["audio"]["voice_num_audio_tokens"] == {**PRESETS, "anna": 40}
    stored = torch.load(folder / "voice_embedding" / "anna.pt", weights_only=True)
    assert stored.dtype == torch.bfloat16 and torch.equal(stored, voice)
    after = contents(folder)
    assert after.pop("voice_embedding/anna.pt") and after.pop(voices.RECORD)
    assert after.pop("tekken.json").replace(b', "anna": 40', b"") == before.pop("tekken.json")
    added = [line for line in after.pop("params.json").splitlines() if line not in before["params.json"].splitlines()]
    assert [line.strip() for line in added if b"anna" in line] == [b'"anna": 2'] and len(added) <= 2
    before.pop("params.json")
    assert after == before


def test_the_same_again_changes_nothing_and_another_one_replaces(folder, end_row):
    register(folder, "anna", embedding(end_row), "anna.pt")
    once = contents(folder)
    assert not register(folder, "anna", embedding(end_row), "anna.pt") and contents(folder) == once
    register(folder, "ben", embedding(end_row, 50), "ben.pt")
    assert register(folder, "anna", embedding(end_row, 60, seed=1), "anna.pt")
    found = {voice.name: voice for voice in list_voices(folder)}
    assert (found["anna"].index, found["anna"].n_tokens, found["anna"].n_rows) == (2, 60, 60)
    assert found["ben"].index == 3 and not any(voice.problem for voice in found.values())


def test_removing_restores_every_byte(folder, end_row):
    before = contents(folder)
    register(folder, "anna", embedding(end_row), "anna.pt")
    register(folder, "ben", embedding(end_row), "ben.pt")
    remove(folder, "anna")
    assert [voice.name for voice in list_voices(folder)] == ["alpha", "beta", "ben"]
    remove(folder, "ben")
    assert contents(folder) == before
    with pytest.raises(VoiceError, match="has no voice ben"):
        remove(folder, "ben")


def test_presets_need_force(folder, end_row):
    before = contents(folder)
    with pytest.raises(VoiceError, match="alpha is a preset"):
        register(folder, "alpha", embedding(end_row), "alpha.pt")
    with pytest.raises(VoiceError, match="alpha is a preset"):
        remove(folder, "alpha")
    assert contents(folder) == before
    register(folder, "alpha", embedding(end_row, 44), "alpha.pt", force=True)
    assert load_params(folder).codec.voice == {"alpha": 0, "beta": 1} and list_voices(folder)[0].n_tokens == 44
    remove(folder, "beta", force=True)
    assert [voice.name for voice in list_voices(folder)] == ["alpha"]


@pytest.mark.parametrize("name", ["Anna", "anna b", "", "änna", "a/b", "..", "anna\n"])
def test_names_that_serving_cannot_find_are_refused(folder, end_row, name):
    with pytest.raises(VoiceError, match="no voice name"):
        register(folder, name, embedding(end_row), "x.pt")
    assert len(list_voices(folder)) == 2


@pytest.mark.parametrize("indent", [None, 1, 4, "\t"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_tekken_json_keeps_its_formatting(folder, end_row, indent, ascii_only):
    content = json.loads((folder / "tekken.json").read_text(encoding="utf-8"))
    content["vocab"][300]["token_str"] = "é"
    before = json.dumps(content, indent=indent, ensure_ascii=ascii_only) + "\n"
    (folder / "tekken.json").write_text(before, encoding="utf-8")
    register(folder, "anna", embedding(end_row), "anna.pt")
    content["audio"]["voice_num_audio_tokens"]["anna"] = 40
    after = (folder / "tekken.json").read_text(encoding="utf-8")
    assert after == json.dumps(content, indent=indent, ensure_ascii=ascii_only) + "\n"
    remove(folder, "anna")
    assert (folder / "tekken.json").read_text(encoding="utf-8") == before


class Killed(BaseException):
    """What a kill looks like from inside: nothing after it runs."""


@pytest.mark.parametrize("n_renames", range(4))
@pytest.mark.parametrize("action", ["register", "remove"])
def test_after_a_kill_list_shows_it_and_the_same_again_completes_it(folder, end_row, monkeypatch, action, n_renames):
    """Dies before rename (or unlink) number n; the states between are the only ones a kill can leave."""
    before = contents(folder)
    work = {
        "register": lambda: register(folder, "anna", embedding(end_row), "anna.pt"),
        "remove": lambda: remove(folder, "anna"),
    }
    work["register"]()
    registered = contents(folder)
    if action == "register":
        remove(folder, "anna")
    left = [n_renames]
    replace, unlink = os.replace, Path.unlink

    def counted(function):
        def call(*arguments, **options):
            if not str(arguments[0]).endswith(".tmp") or function is replace:
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counted(replace))
        patch.setattr(Path, "unlink", counted(unlink))
        with pytest.raises(Killed):
            work[action]()
    anna = [voice for voice in list_voices(folder) if voice.name == "anna"]
    assert (
        all(voice.problem and not voice.is_preset for voice in anna)
        or contents(folder) == registered
        or not anna
        or n_renames == 3
    )
    tokens_of(folder, voice="alpha")
    work[action]()
    assert contents(folder) == (registered if action == "register" else before)


def test_list_names_what_disagrees(folder, end_row):
    register(folder, "anna", embedding(end_row), "anna.pt")
    found = lambda: {voice.name: voice.problem for voice in list_voices(folder)}["anna"]  # noqa: E731
    assert found() == ""
    torch.save(embedding(end_row, 41), folder / "voice_embedding" / "anna.pt")
    assert found() == "tekken.json says 40 rows, the file has 41"
    (folder / "voice_embedding" / "anna.pt").write_bytes(b"no tensor")
    assert "readable voice_embedding" in found()
    register(folder, "anna", embedding(end_row), "anna.pt")
    assert found() == ""
    params = json.loads((folder / "params.json").read_text())
    del params["multimodal"]["audio_tokenizer_args"]["voice"]["anna"]
    (folder / "params.json").write_text(json.dumps(params))
    assert found() == "not in params.json"


def test_a_checkpoint_without_the_places_is_refused(folder, end_row):
    (folder / "tekken.json").write_text('{"audio": {"voice_num_audio_tokens": null}}')
    with pytest.raises(CheckpointError, match="tekken.json has no audio.voice_num_audio_tokens"):
        register(folder, "anna", embedding(end_row), "anna.pt")
    (folder / "tekken.json").unlink()
    with pytest.raises(CheckpointError, match="tekken.json is missing"):
        register(folder, "anna", embedding(end_row), "anna.pt")
    assert not (folder / "voice_embedding" / "anna.pt").exists()


# ---------------------------------------------------------------- mistral_common


def test_mistral_common_builds_the_prompt_of_a_new_voice(folder, end_row):
    presets = {name: tokens_of(folder, voice=name)[0] for name in PRESETS}
    register(folder, "anna", embedding(end_row, 77), "anna.pt")
    tokens, tokenizer = tokens_of(folder, voice="anna")
    text = tokenizer.instruct_tokenizer.tokenizer.encode("the cat", bos=False, eos=False)
    assert tokens == [1, 25] + [24] * 77 + [36] + text + [35, 25]
    assert {name: tokens_of(folder, voice=name)[0] for name in PRESETS} == presets
    assert presets["alpha"] == [1, 25] + [24] * 20 + tokens[79:]
    with pytest.raises(InvalidRequestException, match="Unknown voice 'carl'"):
        tokens_of(folder, voice="carl")
    remove(folder, "anna")
    with pytest.raises(InvalidRequestException, match="Unknown voice 'anna'"):
        tokens_of(folder, voice="anna")


def data_url(audio, rate, subtype="FLOAT"):
    data = io.BytesIO()
    soundfile.write(data, audio, rate, format="WAV", subtype=subtype)
    return "data:audio/wav;base64," + base64.b64encode(data.getvalue()).decode()


@torch.no_grad()
def test_reference_audio_has_as_many_positions_as_our_embedding_has_rows(folder):
    codec = VoxtralCodec.from_checkpoint(folder)
    tokenizer = MistralTokenizer.from_file(folder / "tekken.json")
    noise = torch.randn(1, 1, 24000 * 25, generator=torch.Generator().manual_seed(0)) * 0.1
    lengths = [1, 239, 240, 241, 1919, 1921, 5759, 5760, 5761, 13441, 24000, 71999, 72000, 72001, 105599, 599_999]
    lengths += torch.randint(24000, 24000 * 6, (20,), generator=torch.Generator().manual_seed(1)).tolist()
    for length in lengths:
        request = SpeechRequest(input="the cat", ref_audio=data_url(noise[0, 0, :length].numpy(), 24000))
        n_audio = tokenizer.encode_speech_request(request).tokens.count(24)
        assert n_audio == math.ceil(length / 24000 * 12.5) + 1 == len(codec.voice_embedding(noise[..., :length])), (
            length
        )


@torch.no_grad()
def test_prepared_references_agree_where_mistral_common_counts_one_too_many(folder, tmp_path):
    """To it 7 frames are ceil(13440 / 24000 * 12.5) = 8; of the lengths up to 25 s, 13 are so."""
    odd = [n for n in range(1920, 24000 * 25 + 1, 1920) if math.ceil(n / 24000 * 12.5) != n // 1920]
    assert odd[0] == 13440 and 105_600 in odd
    codec = VoxtralCodec.from_checkpoint(folder)
    tokenizer = MistralTokenizer.from_file(folder / "tekken.json")
    wanted = 105_600 - 7200  # and 0.3 s of pause
    t = np.arange(wanted) / 24000
    soundfile.write(tmp_path / "odd.wav", 0.2 * np.sign(np.sin(2 * np.pi * 150 * t)), 24000)
    waveform = prepare_reference(tmp_path / "odd.wav").waveform
    assert waveform.shape[-1] == 105_599
    request = SpeechRequest(input="the cat", ref_audio=data_url(waveform[0, 0].numpy(), 24000))
    assert tokenizer.encode_speech_request(request).tokens.count(24) == len(codec.voice_embedding(waveform)) == 56


# ---------------------------------------------------------------- embeddings and audio


def test_embeddings_from_both_kinds_of_file(folder, end_row, tmp_path):
    params, voice = load_params(folder), embedding(end_row)
    torch.save(voice.float(), tmp_path / "a.pt")
    save_tensors(tmp_path / "b.safetensors", {"any name": voice})
    torch.save(voice[:-1], tmp_path / "c.pt")
    for name in ("a.pt", "b.safetensors"):
        loaded, notes = load_embedding(tmp_path / name, params, end_row)
        assert torch.equal(loaded, voice) and notes == []
    loaded, notes = load_embedding(tmp_path / "c.pt", params, end_row)
    assert torch.equal(loaded, voice) and len(notes) == 1 and "END_AUDIO" in notes[0]


def test_the_presets_of_a_checkpoint_end_on_our_end_row(folder, end_row):
    for name, n_rows in PRESETS.items():
        loaded, notes = load_embedding(folder / "voice_embedding" / f"{name}.pt", load_params(folder), end_row)
        assert notes == [] and len(loaded) == n_rows
        assert torch.equal(loaded, torch.load(folder / "voice_embedding" / f"{name}.pt"))


# ---------------------------------------------------------------- presets as the release has them


def save_as_on_a_gpu(tensor, path):
    """The file that torch.save() writes of this tensor on cuda:0, made without one."""
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    with zipfile.ZipFile(buffer) as saved, zipfile.ZipFile(path, "w") as changed:
        for name in saved.namelist():
            data = saved.read(name)
            if name.endswith("/data.pkl"):
                assert b"X\x03\0\0\0cpu" in data
                data = data.replace(b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:0")
            changed.writestr(name, data)


@pytest.fixture(scope="module")
def as_released(tmp_path_factory):
    """3072 wide, presets saved on a GPU, whose rows have the norms of the release's: 4.4, and 14.75 the last one."""
    raw, generator = small_params(backbone={"dim": 3072, "hidden_dim": 64}), torch.Generator().manual_seed(0)
    rows = torch.randn(3, 67, 3072, generator=generator)
    rows *= 4.4 / rows.norm(dim=2, keepdim=True)
    rows[:, -1] = torch.randn(3072, generator=generator)
    rows[:, -1] *= 14.75 / rows[:, -1].norm(dim=1, keepdim=True)
    presets = dict(zip(("ar_male", "de_female", "casual_female"), rows.bfloat16()))
    params = parse_params(raw)
    table = random_tensor(EMBEDDING_NAME, (params.audio_embedding_size, 3072)).float()
    table[END_AUDIO] = rows[0, -1] - table[codebook_offsets(params.codec)[1:]].sum(dim=0)
    folder = tmp_path_factory.mktemp("as_released")
    write_random_checkpoint(folder, raw, presets, trained={EMBEDDING_NAME: table.bfloat16()})
    for name, preset in presets.items():
        save_as_on_a_gpu(preset, folder / "voice_embedding" / f"{name}.pt")
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(folder / "voice_embedding" / "ar_male.pt", weights_only=True)
    return folder, presets


def test_presets_saved_on_a_gpu_are_listed_read_and_compared(as_released, capsys):
    folder, presets = as_released
    patch_tokenizer.main(["--checkpoint", str(folder), "--list"])
    assert capsys.readouterr().out.count("  67      5.3  preset      ok") == 3
    assert end_audio_row(folder).norm() == pytest.approx(14.75, rel=0.01)
    for name, preset in presets.items():
        assert torch.equal(named_voice(folder, name), preset)
    read = [rows.float() for rows in preset_embeddings(folder).values()]
    assert all(torch.equal(rows, preset[:-1].float()) for rows, preset in zip(read, presets.values(), strict=True))
    own = voice_statistics(read, [0, 1, 2], 4.4 / math.sqrt(3072))
    compared = compare_voices(own, own)
    assert compared["norm"] == pytest.approx(4.4, rel=0.01) and compared["mean_cosine_to_presets"] == pytest.approx(1)


def test_a_released_preset_is_registered_under_another_name_as_it_is(as_released, tmp_path, capsys):
    folder, presets = shutil.copytree(as_released[0], tmp_path / "copy"), as_released[1]
    patch_tokenizer.main(["--checkpoint", str(folder), "--voice", f"mine={folder / 'voice_embedding' / 'ar_male.pt'}"])
    assert "END_AUDIO" not in capsys.readouterr().out
    stored = torch.load(folder / "voice_embedding" / "mine.pt", weights_only=True)  # on any machine
    assert torch.equal(stored, presets["ar_male"]) and stored.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "tensor,message",
    [
        (torch.zeros(40, 63), r"\[40, 63\]"),
        (torch.zeros(64), r"\[64\]"),
        (torch.zeros(1, 40, 64), r"\[1, 40, 64\]"),
        (torch.zeros(40, 64, dtype=torch.long), "int64"),
        (torch.full((40, 64), float("nan")), "finite"),
        (torch.zeros(12, 64), "13 rows"),
        (torch.zeros(314, 64), "315 rows"),
        (torch.zeros(0, 64), "1 rows"),
        ({"voice": torch.zeros(40, 64)}, "dict"),
    ],
)
def test_embeddings_that_cannot_be_are_refused(folder, end_row, tmp_path, tensor, message):
    torch.save(tensor, tmp_path / "voice.pt")
    with pytest.raises(VoiceError, match=message):
        load_embedding(tmp_path / "voice.pt", load_params(folder), end_row)


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_with_code_is_refused_and_not_run(folder, end_row, tmp_path):
    torch.save(Evil(tmp_path / "owned"), tmp_path / "evil.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Evil(tmp_path / "owned")))
    for name in ("evil.pt", "raw.pt"):
        with pytest.raises(VoiceError, match="refused"):
            load_embedding(tmp_path / name, load_params(folder), end_row)
    assert not (tmp_path / "owned").exists()


def test_missing_and_damaged_files_are_refused(folder, end_row, tmp_path):
    torch.save(embedding(end_row), tmp_path / "voice.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "voice.pt").read_bytes()[:500])
    save_tensors(tmp_path / "two.safetensors", {"a": embedding(end_row), "b": embedding(end_row)})
    (tmp_path / "empty.pt").touch()
    for name, message in (
        ("none.pt", "does not exist"),
        ("half.pt", "half.pt"),
        ("empty.pt", "empty.pt"),
        ("two.safetensors", "2 tensors"),
    ):
        with pytest.raises(VoiceError, match=message):
            load_embedding(tmp_path / name, load_params(folder), end_row)


@torch.no_grad()
def test_audio_is_prepared_and_encoded_with_the_checkpoints_encoder(folder, end_row, pristine):
    codec = VoxtralCodec.from_checkpoint(folder)
    rows, reference = encode_reference(codec, CLIP)
    assert torch.equal(rows, codec.voice_embedding(prepare_reference(CLIP).waveform))
    assert len(rows) == math.ceil(reference.seconds * 12.5) + 1 and torch.allclose(rows[-1], end_row, atol=1e-6)
    with pytest.raises(VoiceError, match="inject_encoder.py"):
        encode_reference(VoxtralCodec.from_checkpoint(pristine.parent / "released"), CLIP)


# ---------------------------------------------------------------- the script


def test_script_registers_a_folder_of_voices(folder, end_row, tmp_path, monkeypatch, run_script):
    monkeypatch.setenv("VOXTRAL_CKPT", str(folder))
    monkeypatch.delenv("VOXTRAL_VOICE_DIR", raising=False)
    code, _, error = run_script(patch_tokenizer.main)
    assert code == 2 and "VOXTRAL_VOICE_DIR" in error
    directory = tmp_path / "my voices"
    directory.mkdir()
    shutil.copy(CLIP, directory / "anna.opus")
    torch.save(embedding(end_row)[:-1], directory / "ben.pt")
    (directory / "readme.txt").write_text("not a voice")
    monkeypatch.setenv("VOXTRAL_VOICE_DIR", str(directory))
    code, out, error = run_script(patch_tokenizer.main)
    assert (code, error) == (0, "") and "high-pass" in out and "END_AUDIO row was missing" in out
    code, out, _ = run_script(patch_tokenizer.main, "--list")
    rows = [line.split() for line in out.splitlines()]
    assert [row[0] for row in rows[1:]] == ["alpha", "beta", "anna", "ben"] and all(row[-1] == "ok" for row in rows[1:])
    assert rows[4][:3] == ["ben", "3", "40"] and rows[1][4:] == ["preset", "ok"] and rows[4][4:] == ["registered", "ok"]
    before = contents(folder)
    code, out, _ = run_script(patch_tokenizer.main)
    assert code == 0 and out.count("was registered so already") == 2 and contents(folder) == before
    n_rows = json.loads((folder / "tekken.json").read_text())["audio"]["voice_num_audio_tokens"]["anna"]
    assert tokens_of(folder, voice="anna")[0].count(24) == n_rows
    assert run_script(patch_tokenizer.main, "--remove", "anna", "--remove", "ben")[0] == 0
    assert [voice.name for voice in list_voices(folder)] == ["alpha", "beta"]


def test_script_writes_nothing_when_one_voice_is_bad(folder, end_row, tmp_path, monkeypatch, run_script):
    monkeypatch.delenv("VOXTRAL_VOICE_DIR", raising=False)
    before = contents(folder)
    torch.save(embedding(end_row), tmp_path / "good.pt")
    good, here = f"anna={tmp_path / 'good.pt'}", ("--checkpoint", folder)
    for voice, message in (
        (f"ben={tmp_path / 'none.wav'}", "does not exist"),
        (f"Ben={tmp_path / 'good.pt'}", "no voice name"),
        (f"alpha={tmp_path / 'good.pt'}", "preset"),
        ("ben", "NAME=FILE"),
        (good, "given twice"),
    ):
        code, _, error = run_script(patch_tokenizer.main, *here, "--voice", good, "--voice", voice)
        assert code == 2 and message in error and error.count("\n") == 1
        assert contents(folder) == before
    assert run_script(patch_tokenizer.main, *here, "--voice", good)[0] == 0
    assert run_script(patch_tokenizer.main, *here, "--voice", f"alpha={tmp_path / 'good.pt'}", "--force")[0] == 0
    assert [voice.n_rows for voice in list_voices(folder)] == [40, 30, 40]


def test_voice_folders_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(VoiceError, match="does not exist"):
        voice_files(tmp_path / "none", Remarks())
    with pytest.raises(VoiceError, match="holds no"):
        voice_files(tmp_path, Remarks())
    (tmp_path / "anna.wav").touch()
    (tmp_path / "anna.pt").touch()
    with pytest.raises(VoiceError, match="same voice"):
        voice_files(tmp_path, Remarks())


def test_what_is_no_voice_in_a_folder_is_named(tmp_path):
    for name in ("anna.wav", "._anna.wav", ".DS_Store", "eve.m4a", "notes.txt", "ben.pt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "carl.wav").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe.wav")
    remarks = Remarks()
    assert set(voice_files(tmp_path, remarks)) == {"anna", "ben"}
    said = "\n".join(remarks.lines())
    assert len(remarks) == 6 and all(
        name in said for name in ("._anna.wav", ".DS_Store", "eve.m4a", "ffmpeg", "notes.txt", "carl.wav", "pipe.wav")
    )


@pytest.mark.parametrize("channels", [1, 6])
def test_a_voice_is_the_same_at_any_gain_and_from_any_channel(pristine, tmp_path, channels):
    audio, rate = soundfile.read(CLIP, dtype="float32")
    codec = VoxtralCodec.from_checkpoint(pristine)
    wanted = encode_reference(codec, CLIP)[0]
    for gain in (0.25, 8, 2.0**100):
        sound = np.zeros((len(audio), channels), np.float32)
        sound[:, channels // 2] = audio * np.float32(gain)
        soundfile.write(tmp_path / "loud.wav", sound, rate, "FLOAT")
        assert torch.equal(encode_reference(codec, tmp_path / "loud.wav")[0], wanted)


def test_no_name_leads_out_of_the_checkpoint(folder):
    (folder.parent / "mine.pt").write_bytes(b"not yours")
    with pytest.raises(VoiceError, match="lead out of"):
        remove(folder, "../../mine", force=True)
    assert (folder.parent / "mine.pt").read_bytes() == b"not yours"


HEADERS = [b"[]", b"3", b'"a"', b'{"a": []}', b'{"a": {"dtype": "F32", "shape": [1]}}', b"[" * 10_000, b"\xff"]
HEADERS += [b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}', b'{"__metadata__": []}']


@pytest.mark.parametrize("header", HEADERS)
def test_safetensors_whose_header_is_something_else_are_refused(tmp_path, header):
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="a.safetensors"):
        SafetensorsFile(tmp_path / "a.safetensors").read()


def test_a_pipe_in_the_place_of_weights_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="a.safetensors is no regular file"):
        SafetensorsFile(tmp_path / "a.safetensors")


def test_a_tensor_that_claims_more_than_it_holds_is_refused_before_it_is_made(tmp_path, folder, end_row):
    torch.save(torch.zeros(1).expand(10**9, 64), tmp_path / "a.pt")
    with pytest.raises(VoiceError, match="1000000000 rows"):
        load_embedding(tmp_path / "a.pt", load_params(folder), end_row)
