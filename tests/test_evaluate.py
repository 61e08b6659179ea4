"""evaluate.py: scores against values worked out by hand, degradations in order, a whole run on a tiny checkpoint."""

import csv
import importlib.util
import math
import sys
import warnings

import numpy as np
import pytest
import soundfile
import soxr
import torch
from conftest import SPEECH, command_line, read_report, write_encoder

import evaluate
from voxtral.codec import VoxtralCodec
from voxtral.data import load_segment
from voxtral.degrade import CHAINS, DEGRADATIONS, band_limit, opus, order, white_noise
from voxtral.errors import UserError
from voxtral.evaluation import (
    AGREEMENT,
    CODES,
    Agreement,
    Averages,
    EncodedClip,
    Sample,
    all_codes,
    clip_codes,
    compare_voices,
    encode_all,
    fresh_encoder,
    gap_closed,
    load_samples,
    voice_statistics,
)
from voxtral.score_table import SCORES
from voxtral.scores import Scorer, estoi, pesq_wb, si_sdr, word_error_rate
from voxtral.sources import Clip

SPEAKERS = {"anna": "k_af_heart_0.opus", "ben": "k_am_adam_0.opus"}


def noise(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.fixture(scope="module")
def speech():
    """Two clips of 2 s."""
    return [torch.from_numpy(load_segment(str(SPEECH / name), 0.0, 2.0)[0]) for name in SPEAKERS.values()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, speech):
    """anna/0.wav, ben/0.wav, anna/short.wav, and a file that is no audio."""
    folder = tmp_path_factory.mktemp("speech")
    for name, waveform in zip(SPEAKERS, speech):
        (folder / name).mkdir()
        soundfile.write(folder / name / "0.wav", waveform.numpy(), 24000)
    soundfile.write(folder / "anna" / "short.wav", speech[0][:20_000].numpy(), 24000)
    (folder / "ben" / "broken.wav").write_text("no audio")
    return folder


@pytest.fixture(scope="module")
def encoders(released, tmp_path_factory):
    """Two random encoders, as files."""
    base = tmp_path_factory.mktemp("encoders")
    return [write_encoder(base / f"{seed}.safetensors", released, seed) for seed in (1, 2)]


@pytest.fixture
def codec(released):
    torch.manual_seed(0)
    return VoxtralCodec.from_checkpoint(released)


def samples_of(waveforms):
    return [Sample(Clip(f"{i}.wav", f"speaker {i}", 0), waveform, 24000) for i, waveform in enumerate(waveforms)]


def run(output, **options):
    evaluate.main(command_line(output=output, device="cpu", **options))
    return read_report(output / "metrics.json")


# ---------------------------------------------------------------- scores


def test_si_sdr_values():
    n = torch.arange(2400)
    sine, cosine = (2 * math.pi * n / 24).sin(), (2 * math.pi * n / 24).cos()  # orthogonal, equally strong, no mean
    assert si_sdr(3 * sine + 0.3 * cosine, sine) == pytest.approx(20, abs=1e-3)
    assert si_sdr(3 * sine + 0.3 * cosine + 5, sine) == pytest.approx(20, abs=1e-3)
    assert si_sdr(sine, sine) == 100 and si_sdr(torch.zeros(2400), sine) == -100
    assert math.isnan(si_sdr(sine, torch.zeros(2400)))


def test_word_error_rate_counts_words_as_whisper_normalises_them():
    assert word_error_rate("Hello, Mr. World!", "hello mister world", "en") == (0, 3)
    assert word_error_rate("one two three four", "one too four", "fr") == (pytest.approx(2 / 4), 4)
    assert word_error_rate("你好世界", "你好时界", "zh") == (pytest.approx(1 / 4), 4)  # characters
    assert word_error_rate("a b", "a b c d e f", "de")[0] == pytest.approx(2)
    rate, words = word_error_rate("...", "something", "en")
    assert math.isnan(rate) and words == 0


def test_scores_that_a_clip_does_not_have_are_nan():
    pytest.importorskip("pesq", reason="PESQ is optional: pip install pesq")
    pytest.importorskip("pystoi", reason="ESTOI is optional: pip install pystoi")
    short = noise(3000).numpy()
    assert math.isnan(pesq_wb(short, short)) and math.isnan(estoi(short, short, 24000))
    assert math.isnan(pesq_wb(np.zeros(32000, np.float32), noise(32000).numpy()))


def test_every_score_is_of_the_own_source(speech, speaker_checkpoint, whisper_checkpoint):
    scorer = Scorer(["mel", "stft", "sisdr", "wer", "speaker"], 24000, "cpu", whisper_checkpoint, speaker_checkpoint)
    source = scorer.listen(speech[0][:24_000])
    same, other = (scorer.score(source, x[:24_000]) for x in speech)
    assert list(same) == ["mel", "stft", "sisdr", "wer", "speaker", "words", "text"]
    assert (same["mel"], same["stft"], same["sisdr"], same["text"]) == (0, 0, 100, source.text)
    assert same["speaker"] == pytest.approx(1, abs=1e-5) and other["speaker"] < same["speaker"]
    assert other["mel"] > 0.5 and other["sisdr"] < 0 and (same["wer"] == 0 or same["words"] == 0)


def test_reconstructions_are_transcribed_in_the_language_of_the_source(speech, whisper_checkpoint, monkeypatch):
    scorer = Scorer(["wer"], 24000, "cpu", whisper_checkpoint)
    asked, texts = [], iter(["Ein kleiner Test.", "ein Test"])

    def transcribe(audio, language, **options):
        asked.append((len(audio), language))
        return {"text": next(texts), "language": "de"}

    monkeypatch.setattr(scorer.whisper, "transcribe", transcribe)
    row = scorer.score(scorer.listen(speech[0]), speech[1])
    assert asked == [(32000, None), (32000, "de")]  # 2 s at 16 kHz
    assert row == {"wer": pytest.approx(1 / 3), "words": 3, "text": "ein Test"}


FAKE_SPEECHBRAIN = """
import torch

class EncoderClassifier:
    @classmethod
    def from_hparams(cls, source, overrides, overrides_must_match, run_opts):
        if source != "ecapa":
            raise ConnectionError(f"no network for {source}")
        assert overrides == {"pretrained_path": source} and not overrides_must_match and run_opts == {"device": "cpu"}
        return cls()

    def encode_batch(self, waveform):
        # [B, T] -> [B, 1, 192], as SpeechBrain's: here the start of the clip.
        return waveform[:, None, :192].clone()
"""


@pytest.fixture
def fake_speechbrain(tmp_path, monkeypatch):
    """A package of that name, in the place of an installed one."""
    folder = tmp_path / "fake" / "speechbrain" / "inference"
    folder.mkdir(parents=True)
    for file, text in (
        (folder.parent / "__init__.py", ""),
        (folder / "__init__.py", ""),
        (folder / "speaker.py", FAKE_SPEECHBRAIN),
    ):
        file.write_text(text)
    for name in [name for name in sys.modules if name.split(".")[0] == "speechbrain"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(folder.parents[1])
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "speechbrain"]:
        del sys.modules[name]


def test_ecapa_compares_embeddings_at_16_khz(fake_speechbrain, speech):
    scorer = Scorer(["mel", "ecapa"], 24000, "cpu", ecapa_model="ecapa")
    source = scorer.listen(speech[0])
    a, b = (torch.from_numpy(soxr.resample(x.numpy(), 24000, 16000, quality="HQ"))[:192] for x in speech)
    assert source.ecapa.shape == (1, 192) and list(scorer.score(source, speech[0])) == ["mel", "ecapa"]
    assert scorer.score(source, speech[0])["ecapa"] == pytest.approx(1, abs=1e-5)
    assert scorer.score(source, speech[1])["ecapa"] == pytest.approx(torch.cosine_similarity(a, b, 0).item(), abs=1e-4)


def test_ecapa_without_weights_says_what_to_do(fake_speechbrain, folder, tmp_path, refused):
    message = refused(evaluate.main, command_line(degrade=True, data=folder, output=tmp_path, metrics="ecapa"))
    assert "--ecapa-model" in message and "no network for speechbrain/spkrec-ecapa-voxceleb" in message


# ---------------------------------------------------------------- degradations


def test_degradations_are_what_their_names_say(speech):
    x = speech[0]
    assert all(len(degrade(x)) == len(x) for degrade in DEGRADATIONS.values())
    assert torch.equal(DEGRADATIONS["identity"](x), x)
    assert si_sdr(white_noise(x, 20), x) == pytest.approx(20, abs=0.1)
    above_8k = slice(round(8500 / 24000 * len(x)), None)
    hiss, window = noise(len(x)), torch.hann_window(len(x))
    kept, before = (torch.fft.rfft(audio * window)[above_8k].norm() for audio in (band_limit(hiss), hiss))
    assert kept < 1e-3 * before
    assert set(DEGRADATIONS) == {name for chain in CHAINS.values() for name in chain}


@pytest.mark.parametrize("kbps", [6, 12, 24])
def test_opus_files_have_the_rate(speech, kbps, monkeypatch):
    written, write = [], soundfile.write
    monkeypatch.setattr(soundfile, "write", lambda file, *a, **k: (write(file, *a, **k), written.append(file.tell())))
    opus(speech[0], kbps)
    assert kbps - 1 < written[0] * 8 / (len(speech[0]) / 24) < kbps + 5  # and the container


@pytest.mark.parametrize("name", ["mel", "stft", "sisdr", "pesq", "estoi", "speaker"])
def test_scores_order_degradations_rightly(speech, name):
    for package in SCORES[name].packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{name} is optional: {SCORES[name].install}")
    scorer = Scorer([name], 24000, "cpu")
    source = scorer.listen(speech[1])
    values = {key: scorer.score(source, degrade(speech[1]))[name] for key, degrade in DEGRADATIONS.items()}
    assert order(values, SCORES[name].higher_is_better) == {chain: "right" for chain in CHAINS}, values


def test_dnsmos_hears_noise(speech):
    for package in SCORES["dnsmos"].packages:
        pytest.importorskip(package, reason=f"DNSMOS is optional: {SCORES['dnsmos'].install}")
    scorer = Scorer(["dnsmos"], 24000, "cpu")
    source = scorer.listen(speech[1])
    noisy = scorer.score(source, DEGRADATIONS["noise_10db"](speech[1]))["dnsmos"]
    assert 1 <= noisy < source.dnsmos - 0.5 and source.dnsmos <= 5


def test_order_tells_ties_and_wrong_steps():
    values = dict.fromkeys(DEGRADATIONS, 0.0) | {"identity": 3.0, "opus_24k": 2.0, "opus_12k": 1.0, "opus_6k": 0.5}
    values |= {"band_limit_16k": 3.0, "noise_10db": 1.0}
    assert order(values, True) == {"band": "tie", "opus": "right", "noise": "wrong"}
    assert order(values, False) == {"band": "tie", "opus": "wrong", "noise": "wrong"}


# ---------------------------------------------------------------- codes and embeddings


def test_every_clip_is_encoded_as_serving_does_as_if_alone(codec, speech):
    clips = [speech[0], speech[1][:20_001]]
    for clip, (encoded, decoded) in zip(clips, encode_all(codec, samples_of(clips))):
        with torch.no_grad():
            codes = codec.encode(clip[None, None])
            assert torch.equal(encoded.codes, codes[0]) and encoded.latent.dtype == torch.float32
            assert torch.equal(encoded.latent, codec.served_latent(clip[None, None])[0].float())
            torch.testing.assert_close(
                decoded, codec.decode(codes)[0, 0, : len(clip)], rtol=0, atol=1e-5
            )  # padded to a second
            rows = codec.voice_embedding(clip[None, None])[:-1]  # what serving would show the LLM
        measured = clip_codes(codec, encoded)
        assert measured["frames"] == len(rows) == math.ceil(len(clip) / 1920)
        assert measured["embedding_norm"] == pytest.approx(rows.norm(dim=1).mean().item(), rel=1e-5)
        assert measured["semantic_per_clip"] == len(set(codes[0, 0].tolist()))
        assert measured["extremes_share"] == pytest.approx(((codes[0, 1:] == 0) | (codes[0, 1:] == 20)).float().mean())


def test_codes_of_all_clips_together(codec):
    codes = torch.full((37, 4), 10)
    codes[0] = torch.tensor([1, 1, 2, 2])
    more = codes[:, :2].clone()
    more[1:] = 20
    result = all_codes(codec, [EncodedClip(torch.zeros(1), codes), EncodedClip(torch.zeros(1), more)])
    assert (result["frames"], result["semantic_used"], result["semantic_dead_share"]) == (6, 2, 1 - 2 / 64)
    entropy = -(4 / 6 * math.log(4 / 6) + 2 / 6 * math.log(2 / 6))
    assert result["semantic_perplexity"] == pytest.approx(math.exp(entropy))
    assert [result["level_histogram"][level] for level in (10, 20)] == pytest.approx([4 / 6, 2 / 6])


def test_agreement_by_hand(codec):
    codebook, agreement = codec.quantizer.semantic_codebook.embedding, Agreement(codec)
    third = (codebook - codebook[5]).norm(dim=1).argsort()[2].item()  # third nearest to entry 5, itself the first
    shift = 0.1 * torch.ones(36, 1)  # one level after tanh

    def clip(semantic, level):
        acoustic = torch.atanh(torch.tensor(level * 2 / 20 - 1)) * torch.ones(36, 1)
        latent = torch.cat([codebook[semantic][:, None], acoustic]).repeat(1, 3)
        return EncodedClip(latent, codec.quantizer.encode(latent[None])[0])

    own, reference = clip(5, 12.0), clip(third, 11.0)
    perfect = [1, 1, 1, 1, 0, 0, 1]
    assert list(agreement(own, own).values()) == pytest.approx(perfect, abs=1e-5)
    measured = agreement(own, reference)
    assert list(measured) == list(AGREEMENT)
    assert (measured["semantic_equal"], measured["semantic_rank"]) == (0, 3)
    assert (measured["levels_equal"], measured["levels_within_1"]) == (0, 1)
    assert measured["acoustic_distance"] == pytest.approx(10 * shift[0].item(), rel=1e-4)
    nearest = torch.cdist(codebook, codebook).fill_diagonal_(torch.inf).amin(dim=1).square().median()
    expected = (codebook[5] - codebook[third]).square().sum() / nearest
    assert measured["semantic_distance"] == pytest.approx(expected.item(), rel=1e-3)
    rows = [codec.embed_codes(each.codes[None])[0] for each in (own, reference)]
    assert measured["embedding_cosine"] == pytest.approx(torch.cosine_similarity(*rows, dim=1).mean().item(), abs=1e-5)


def test_voice_statistics_by_hand():
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    voices = voice_statistics(
        [torch.stack([east, north]), torch.stack([east, east]), torch.stack([east, east])],
        ["anna", "anna", "ben"],
        rms=15.0,
    )
    assert (voices.rows, voices.norm) == (6, pytest.approx(7 / 6))
    assert voices.mean.tolist() == pytest.approx([5 / 6, 2 / 6])
    assert voices.variance.tolist() == pytest.approx([5 / 6 - 25 / 36, 4 / 6 - 4 / 36])
    assert voices.near_zero_share == pytest.approx(11 / 12)  # all but the 2
    assert voices.cosine_within_voice == pytest.approx((0 + 1 + 1) / 3)
    assert voices.cosine_within_speaker == pytest.approx(1 / math.sqrt(5))  # of (1, 2) / 2 and (1, 0)
    assert voices.cosine_between_speakers == pytest.approx((1 / math.sqrt(5) + 1) / 2)
    same = compare_voices(voices, voices)
    assert same["mean_distance_to_presets"] == 0
    assert [
        same[key] for key in ("mean_cosine_to_presets", "variance_over_presets", "log_variance_correlation")
    ] == pytest.approx([1, 1, 1])
    with warnings.catch_warnings():  # of an encoder that always says the same
        warnings.simplefilter("error")
        constant = voice_statistics([torch.ones(3, 2)], ["anna"], rms=15.0)
        assert math.isnan(compare_voices(constant, voices)["log_variance_correlation"])


def test_untrained_is_where_training_starts(codec, released):
    state = torch.random.get_rng_state()
    tensors = fresh_encoder(codec, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(3)
    own = VoxtralCodec.from_checkpoint(released).encoder_tensors()
    assert set(tensors) == set(own) and all(torch.equal(tensors[name], own[name]) for name in own)


# ---------------------------------------------------------------- averages and intervals


def test_means_are_weighted_and_leave_out_what_is_not_measured():
    averages = Averages(["anna", "anna", "ben"], seed=0)
    rows = [
        {"mel": 1.0, "wer": 0.5, "words": 2},
        {"mel": math.nan, "wer": 0.0, "words": 6},
        {"mel": 4.0, "wer": math.nan, "words": 0},
    ]
    assert averages.means(rows, "mel")[0] == pytest.approx(2.5)
    assert averages.means(rows, "wer")[0] == pytest.approx(1 / 8)


def test_intervals_draw_whole_speakers():
    speakers, rows = ["anna"] * 3 + ["ben"] * 3, [{"mel": value} for value in (0, 0, 0, 1.0, 1.0, 1.0)]
    means = Averages(speakers, seed=0).means(rows, "mel")
    drawn, counts = np.unique(means[1:], return_counts=True)
    assert means[0] == 0.5 and drawn.tolist() == [0, 0.5, 1]
    assert counts / counts.sum() == pytest.approx([0.25, 0.5, 0.25], abs=0.05)
    assert np.array_equal(means, Averages(speakers, seed=0).means(rows, "mel"))
    assert not np.array_equal(means, Averages(speakers, seed=1).means(rows, "mel"))


def test_interval_of_many_speakers_is_the_standard_error():
    random = np.random.default_rng(0)
    values = random.normal(size=200)
    averages = Averages([f"{i:03d}" for i in range(200)], seed=0)
    summary = averages.summary(averages.means([{"mel": value} for value in values], "mel"))
    half = 1.96 * values.std() / math.sqrt(200)
    assert summary["interval"] == pytest.approx([summary["value"] - half, summary["value"] + half], abs=0.02)


def test_one_speaker_has_no_interval():
    averages = Averages(["anna", "anna"], seed=0)
    assert averages.summary(averages.means([{"mel": 1.0}, {"mel": 2.0}], "mel")) == {"value": 1.5, "interval": None}


def test_gap_closed():
    assert gap_closed(4.0, 4.0, 2.0) == 0 and gap_closed(4.0, 2.0, 2.0) == 1 and gap_closed(0.0, 0.75, 1.0) == 0.75
    assert gap_closed(4.0, 1.0, 2.0) == 1.5 and math.isnan(gap_closed(2.0, 1.0, 2.0))
    assert gap_closed(np.array([4.0, 2.0]), np.array([3.0, 1.0]), np.array([2.0, 0.0])).tolist() == [0.5, 0.5]


# ---------------------------------------------------------------- the script


def test_silent_clips_are_left_out_and_said(folder, tmp_path):
    soundfile.write(tmp_path / "silent.wav", np.zeros(48_000), 24_000)
    clips = [Clip(str(tmp_path / "silent.wav"), "anna", 0), Clip(str(folder / "anna" / "0.wav"), "anna", 0)]
    samples, bad = load_samples(clips, 2.0)
    assert [sample.clip for sample in samples] == clips[1:] and bad == [f"{tmp_path}/silent.wav: is silent"]


def test_a_whole_evaluation(released, encoders, folder, tmp_path, capsys):
    report = run(
        tmp_path, checkpoint=released, encoder=encoders[1], reference_encoder=encoders[0], data=folder, samples=1
    )
    assert (report["clips"], report["speakers"]) == (3, 2)
    assert "broken.wav: is text, not audio" in report["bad_clips"][0]
    assert list(report["systems"]) == ["reference", "encoder", "untrained"]
    names = ["mel", "stft", "sisdr", *CODES, *AGREEMENT]
    for system in report["systems"].values():
        assert list(system["metrics"]) == names and system["metrics"]["mel"]["clips"] == 3
        assert len(system["codes"]["level_histogram"]) == 21 and "norm" in system["voices"]
    metrics = {
        name: {key: value["value"] for key, value in system["metrics"].items()}
        for name, system in report["systems"].items()
    }
    assert metrics["reference"]["semantic_equal"] == 1 > metrics["encoder"]["semantic_equal"]
    assert set(report["gap_closed"]) >= set(names)
    mel = [metrics[name]["mel"] for name in ("untrained", "encoder", "reference")]
    assert report["gap_closed"]["mel"]["value"] == pytest.approx((mel[0] - mel[1]) / (mel[0] - mel[2]))
    assert len(report["gap_closed"]["mel"]["interval"]) == 2
    assert report["presets"]["rows"] == 12 + 30  # without END_AUDIO
    assert set(report["not_measured"]) == set(SCORES) - {"mel", "stft", "sisdr"}
    assert "pip install pesq" in report["not_measured"]["pesq"]

    with (tmp_path / "clips.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["system"] for row in rows] == ["reference"] * 3 + ["encoder"] * 3 + ["untrained"] * 3
    assert [row["speaker_name"] for row in rows[:3]] == ["anna", "anna", "ben"]
    mean = sum(float(row["mel"]) for row in rows if row["system"] == "encoder") / 3
    assert mean == pytest.approx(metrics["encoder"]["mel"])
    written = {path.name for path in tmp_path.iterdir()}
    plots = {f"{name}.png" for name in ("scores", "levels", "voices", "gap", "clip_0")}
    audio = {f"clip_0_{name}.wav" for name in ("source", *report["systems"])}
    assert written == {"metrics.json", "table.md", "clips.csv"} | plots | audio
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
    assert "- pesq: add pesq to --metrics; pip install pesq" in (tmp_path / "table.md").read_text()


def test_the_reference_itself_closes_the_whole_gap(released, encoders, folder, tmp_path):
    same = {"checkpoint": released, "encoder": encoders[0], "reference_encoder": encoders[0]}
    gaps = run(tmp_path, **same, data=folder, samples=0, max_sec=0.5)["gap_closed"]
    assert all(gap["value"] in (1, None) for gap in gaps.values()) and gaps["semantic_equal"]["value"] == 1
    assert gaps["levels_equal"]["interval"] == [1, 1]


def test_data_is_a_config_with_its_validation_clips_or_all(folder, tmp_path):
    config = tmp_path / "data.yaml"
    config.write_text(
        f"data:\n  data_root: {folder}\n  sources:\n"
        "  - {kind: folder}\n  - {kind: folder, path: absent}\n"
        "  validation: {clips: 1, speakers: [ben]}\n"
    )
    clips, absent = evaluate.choose_clips(str(config), ["data.validation.clips=5"], False)
    assert {clip.speaker for clip in clips} == {"ben"} and len(clips) == 2 and "absent" in absent[0]
    assert len(evaluate.choose_clips(str(config), [], False)[0]) == 1
    everything, _ = evaluate.choose_clips(str(config), [], True)
    assert len(everything) == 4
    of_folder, _ = evaluate.choose_clips(str(folder), [], False)
    assert [clip.path for clip in of_folder] == [clip.path for clip in everything]
    manifest = tmp_path / "some.csv"
    manifest.write_text("path,speaker\n" + "".join(f"{clip.path},{clip.speaker}\n" for clip in everything[:3]))
    assert evaluate.choose_clips(str(manifest), [], False)[0] == everything[:3]
    with pytest.raises(UserError, match="only a config has keys to set"):
        evaluate.choose_clips(str(manifest), ["data.max_sec=2"], False)


def test_calibration_needs_no_checkpoint(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("VOXTRAL_CKPT", raising=False)
    report = run(tmp_path, degrade=True, data=folder / "anna", metrics="sisdr,mel", samples=1, max_sec=1)
    assert list(report["systems"]) == list(DEGRADATIONS)
    assert report["order"] == {name: {chain: "right" for chain in CHAINS} for name in ("sisdr", "mel")}
    assert report["systems"]["noise_20db"]["metrics"]["sisdr"]["value"] == pytest.approx(20, abs=0.2)
    assert report["speakers"] == 1 and report["systems"]["identity"]["metrics"]["mel"]["interval"] is None
    assert "opus: right" in (tmp_path / "table.md").read_text()
    wavs = {path.name for path in tmp_path.glob("*.wav")}
    assert wavs == {f"clip_0_{name}.wav" for name in ("source", *DEGRADATIONS)}


@pytest.mark.parametrize("name", [name for name, metric in SCORES.items() if metric.packages])
def test_a_score_without_its_package_names_what_to_install(name, folder, tmp_path, refused, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda p, *a: None if p in SCORES[name].packages else find(p, *a))
    out = tmp_path / "out"
    message = refused(evaluate.main, command_line(degrade=True, data=folder, output=out, metrics=f"mel,{name}"))
    assert SCORES[name].install in message and f"--metrics {name}" in message and not out.exists()


def test_mistakes_are_one_sentence(released, encoders, folder, tmp_path, refused, monkeypatch):
    monkeypatch.delenv("VOXTRAL_CKPT", raising=False)

    def said(*overrides, data=folder, **options):
        return refused(evaluate.main, [*command_line(data=data, output=tmp_path / "out", **options), *overrides])

    assert "pass --encoder" in said(checkpoint=released)
    assert "pass --checkpoint" in said()
    assert "there is no 'pesk'" in said(degrade=True, metrics="pesk")
    assert "--degrade uses no encoder" in said(degrade=True, encoder=encoders[0])
    assert "--samples is -1" in said(degrade=True, samples=-1)
    assert "--max-sec is nan" in said(degrade=True, max_sec="nan")
    assert "only a config has keys" in said("data.max_sec=1", degrade=True)
    assert "--whisper: " in said(degrade=True, metrics="wer", whisper="none")
    assert "--speaker-model: " in said(degrade=True, metrics="speaker", speaker_model="none")
    assert "absent.safetensors is missing" in said(checkpoint=released, encoder=tmp_path / "absent.safetensors")
    assert "absent.yaml" in said(degrade=True, data="absent.yaml")
    (tmp_path / "broken.wav").write_text("no audio")
    assert "None of the 1 clips" in said(degrade=True, data=tmp_path)
