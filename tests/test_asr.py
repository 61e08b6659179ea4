"""Whisper distillation: loss and alignment by hand, the teacher end to end with a random tiny Whisper."""

from contextlib import contextmanager, nullcontext
from itertools import count

import pytest
import torch
import whisper

from voxtral.asr import AsrConfig, AsrTargets, WhisperTeacher, asr_distillation_loss, load_whisper, soft_alignment


@pytest.fixture(scope="module")
def teacher(whisper_checkpoint):
    return WhisperTeacher(AsrConfig(model=whisper_checkpoint), max_sec=2.0, device="cpu")


def clips():
    """One of 1 s in a batch with one of 2 s."""
    waveform = torch.randn(2, 1, 48_000, generator=torch.Generator().manual_seed(1)) * 0.1
    return waveform, torch.tensor([24_000, 48_000])


# ---------------------------------------------------------------- loss


def targets(hidden, n_text, n_frames):
    """Token l is spoken in frame l."""
    n_tokens = hidden.shape[1]
    mask = torch.arange(n_tokens) < torch.tensor(n_text)[:, None]
    return AsrTargets(hidden, torch.eye(n_tokens, n_frames).expand(len(hidden), -1, -1), mask)


@pytest.mark.parametrize(
    "embedding, expected", [([2.0, 0.0], 0.0), ([-1.0, 0.0], 2.0), ([0.0, 5.0], 1.0), ([3.0, 4.0], 0.4)]
)
def test_loss_is_one_minus_the_cosine(embedding, expected):
    hidden = torch.tensor([[[1.0, 0.0]]])
    projected = torch.tensor(embedding)[None, :, None]  # [1, 2, 1]
    loss = asr_distillation_loss(projected, targets(hidden, [1], 1))
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_loss_pools_frames_by_the_alignment():
    hidden = torch.tensor([[[1.0, 0.0]]])
    projected = torch.tensor([[[3.0, 0.0, -9.0], [0.0, 4.0, 0.0]]])  # frames (3, 0), (0, 4) and (-9, 0)
    pooled = AsrTargets(hidden, torch.tensor([[[0.5, 0.5, 0.0]]]), torch.ones(1, 1, dtype=torch.bool))
    assert asr_distillation_loss(projected, pooled).item() == pytest.approx(1 - 3 / 5)


def test_loss_averages_over_a_clips_tokens_then_over_all_clips():
    hidden = torch.tensor([1.0, 0.0]).expand(3, 3, 2)
    same, opposite, orthogonal = [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]
    projected = torch.tensor(
        [
            [opposite, opposite, opposite],  # 1 token: 2; the padding does not count
            [same, orthogonal, opposite],  # 3 tokens: 1
            [opposite, opposite, opposite],
        ]
    )  # none: 0
    loss = asr_distillation_loss(projected.transpose(1, 2), targets(hidden, [1, 3, 0], 3))
    assert loss.item() == pytest.approx((2 + 1 + 0) / 3)


def test_loss_without_any_token_is_zero_with_finite_gradients():
    projected = torch.zeros(2, 4, 3, requires_grad=True)
    nothing = AsrTargets(torch.zeros(2, 1, 4), torch.zeros(2, 1, 3), torch.zeros(2, 1, dtype=torch.bool))
    loss = asr_distillation_loss(projected, nothing)
    loss.backward()
    assert loss.item() == 0 and projected.grad.abs().max() == 0  # NaN would not equal 0


# ---------------------------------------------------------------- alignment


def test_alignment_by_hand():
    """Two tokens of 8 positions each; the end's row looks at one, which the median filter takes out."""
    scores = torch.full((1, 1, 3, 20), -100.0)
    scores[0, 0, 0, 0:8] = scores[0, 0, 1, 8:16] = scores[0, 0, 2, 15] = 0.0
    alignment = soft_alignment(scores, torch.tensor([2]), torch.tensor([16]), n_frames=6)
    assert torch.allclose(alignment, torch.tensor([[[1.0, 1, 0, 0, 0, 0], [0.0, 0, 1, 1, 0, 0]]]), atol=1e-6)


def test_alignment_shares_a_position_among_tokens_only():
    """Rows beyond the clip's own tokens (and its end) take no share, positions beyond its end have none."""
    scores = torch.zeros(1, 2, 4, 40)
    alignment = soft_alignment(scores, torch.tensor([2]), torch.tensor([16]), n_frames=5)
    assert torch.allclose(alignment[0, :2, :4], torch.tensor(1 / 3)) and alignment[0, 2].max() == 0
    assert alignment[..., 4].max() == 0


# ---------------------------------------------------------------- teacher


def test_teacher_end_to_end(teacher):
    waveform, lengths = clips()
    out = teacher(waveform, lengths, 25)
    n_tokens = out.mask.shape[1]
    assert teacher.width == 16 and 1 <= n_tokens <= 15  # 7.5 tokens per second
    assert out.hidden.shape == (2, n_tokens, 16) and out.alignment.shape == (2, n_tokens, 25)
    assert out.hidden.dtype == out.alignment.dtype == torch.float32 and out.mask.any(dim=1).all()
    assert out.alignment.min() >= 0 and out.alignment[0, :, 13:].max() == 0  # 1 s has 12.5 frames
    assert (out.alignment.sum(dim=2) > 0).equal(out.mask)


def test_padding_and_the_rest_of_the_batch_change_nothing(teacher):
    waveform, lengths = clips()
    together = teacher(waveform, lengths, 25)
    alone = teacher(waveform[:1, :, :24_000], lengths[:1], 13)
    n = int(alone.mask.sum())
    assert n == int(together.mask[0].sum())
    assert torch.allclose(alone.hidden[0, :n], together.hidden[0, :n], atol=1e-4)
    assert torch.allclose(alone.alignment[0, :n], together.alignment[0, :n, :13], atol=1e-4)


def test_a_quiet_clip_hears_the_same_beside_a_loud_one(teacher):
    waveform, lengths = clips()
    waveform[1] *= 1e-4
    together, alone = teacher.mel(waveform, lengths)[1], teacher.mel(waveform[1:], lengths[1:])[0]
    assert torch.allclose(together, alone, atol=1e-4)


def test_hidden_states_predict_the_text(teacher):
    waveform, lengths = clips()
    with torch.no_grad():
        features = teacher.model.encoder(teacher.mel(waveform, lengths))
        tokens, n_text = teacher.transcribe(features)
        hidden, _ = teacher.read(tokens, features)
    logits = hidden @ teacher.model.decoder.token_embedding.weight.T
    rank = [
        (row > row[token]).sum().item()
        for rows, text, n in zip(logits, tokens[:, teacher.n_prefix :], n_text)
        for row, token in zip(rows[:n], text)
    ]
    assert len(rank) >= 2 and max(rank) < 20  # 0, but for the few tokens that decoding suppresses


@pytest.mark.parametrize("language", [None, "ar"])
def test_transcription_equals_the_librarys(whisper_checkpoint, language):
    """Without the silence rule, which whisper.decode leaves to its caller."""
    teacher = WhisperTeacher(AsrConfig(model=whisper_checkpoint, language=language), max_sec=2.0, device="cpu")
    teacher.suppressed[:, teacher.tokenizer.timestamp_begin :] = 0  # a random model says many; the library lets it
    waveform, lengths = clips()
    with torch.no_grad():
        features = teacher.model.encoder(teacher.mel(waveform, lengths))
        tokens, _ = teacher.transcribe(features)
    options = whisper.DecodingOptions(
        language=language, without_timestamps=True, sample_len=teacher.max_tokens, fp16=False
    )
    for result, row in zip(whisper.decode(teacher.model, features, options), tokens):
        assert row[1].item() == teacher.tokenizer.to_language_token(result.language)
        assert row[teacher.n_prefix :].tolist()[: len(result.tokens)] == result.tokens and len(result.tokens) >= 2


def speak(teacher, monkeypatch, no_speech, certain):
    """Makes the decoder say token 400, then end, with this probability of silence and certainty."""
    position = count()

    def logits(token, features, kv_cache):
        i, out = next(position), torch.zeros(1, 1, teacher.model.dims.n_vocab)
        if i == 0:
            out[:, :, teacher.tokenizer.no_speech] = 30.0 if no_speech else 0.0
        if i >= teacher.n_prefix - 1:
            out[:, :, 400 if i < teacher.n_prefix else teacher.tokenizer.eot] = 30.0 if certain else 1.0
        return out

    monkeypatch.setattr(teacher.model.decoder, "forward", logits)
    return teacher.transcribe(torch.zeros(1, 2, 16))[1].item()


@pytest.mark.parametrize("no_speech, certain, n_text", [(True, False, 0), (True, True, 1), (False, False, 1)])
def test_only_uncertain_text_in_silence_is_dropped(teacher, monkeypatch, no_speech, certain, n_text):
    assert speak(teacher, monkeypatch, no_speech, certain) == n_text


def test_clip_without_speech_has_no_tokens(teacher, monkeypatch):
    transcribe = teacher.transcribe
    waveform, lengths = clips()
    monkeypatch.setattr(teacher, "transcribe", lambda features: (transcribe(features)[0], torch.tensor([0, 2])))
    assert teacher(waveform, lengths, 25).mask.sum(dim=1).tolist() == [0, 2]
    monkeypatch.setattr(teacher, "transcribe", lambda features: (transcribe(features)[0], torch.tensor([0, 0])))
    out = teacher(waveform, lengths, 25)
    projected = torch.randn(2, 16, 25, requires_grad=True)
    loss = asr_distillation_loss(projected, out)
    loss.backward()
    assert not out.mask.any() and loss.item() == 0 and projected.grad.abs().max() == 0


def test_nothing_of_the_teacher_is_trained(teacher):
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    waveform, lengths = clips()
    assert not teacher(waveform.requires_grad_(), lengths, 25).hidden.requires_grad


def test_alignment_heads_come_from_the_checkpoint(teacher, whisper_checkpoint, tmp_path):
    assert teacher.heads == [[1, 0]]
    content = torch.load(whisper_checkpoint, weights_only=True)
    del content["alignment_heads_dump"]
    torch.save(content, tmp_path / "plain.pt")
    with pytest.warns(UserWarning, match="asr.model"):
        plain = load_whisper(str(tmp_path / "plain.pt"), "cpu")
    assert plain.alignment_heads.indices().T.tolist() == [[1, 0], [1, 1]]


# ---------------------------------------------------------------- what a user may get wrong


def test_unknown_model():
    with pytest.raises(ValueError, match=r"asr\.model is 'huge'.*large-v3"):
        WhisperTeacher(AsrConfig(model="huge"), 4.0, "cpu")


def test_file_that_is_no_whisper(tmp_path):
    path = tmp_path / "other.pt"
    for content in ({"weights": torch.zeros(1)}, [1.0]):
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"asr\.model.*other\.pt is not an openai-whisper checkpoint"):
            load_whisper(str(path), "cpu")
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"asr\.model.*other\.pt is not an openai-whisper checkpoint"):
        load_whisper(str(path), "cpu")


def test_failed_download(monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(whisper, "load_model", no_network)
    with pytest.raises(ValueError, match=r"asr\.model.*no route to host.*local \.pt"):
        load_whisper("base", "cpu")


@pytest.mark.parametrize("max_sec, context_sec", [(4.0, 4.0), (4.0, 9.0), (4.0, 31.0), (20.0, 29.0), (31.0, 30.0)])
def test_context_that_does_not_fit(whisper_checkpoint, max_sec, context_sec):
    with pytest.raises(ValueError, match=r"asr\.context_sec"):
        WhisperTeacher(AsrConfig(model=whisper_checkpoint, context_sec=context_sec), max_sec, "cpu")


def test_clip_longer_than_announced(teacher):
    with pytest.raises(ValueError, match=r"data\.max_sec"):
        teacher(torch.zeros(1, 1, 48_001), torch.tensor([48_001]), 26)


def test_unknown_language(whisper_checkpoint):
    with pytest.raises(ValueError, match=r"asr\.language is 'english'"):
        WhisperTeacher(AsrConfig(model=whisper_checkpoint, language="english"), 4.0, "cpu")


# ---------------------------------------------------------------- CUDA graph


def test_its_graph_is_captured_on_a_stream_of_its_own(teacher, monkeypatch):
    """Of the default stream, which all other graphs are captured on, it would share cuBLAS's workspace."""
    captured = []

    class Stream:
        def __init__(self, device=None):
            pass

        def wait_stream(self, stream):
            pass

    @contextmanager
    def graph(cuda_graph, stream=None):
        captured.append(stream)
        yield

    for name, fake in (("CUDAGraph", object), ("Stream", Stream), ("graph", graph), ("current_stream", Stream)):
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(teacher, "recorded", None)
    teacher.record(2)
    assert len(captured) == 1 and isinstance(captured[0], Stream)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="two CUDA graphs at once need a GPU")
def test_beside_the_codec_it_computes_what_it_does_alone(import_script, tmp_path):
    """At full size, with random weights: smaller products may not use the workspace."""
    dims = {"n_mels": 80, "n_vocab": 51865, "n_audio_ctx": 1500, "n_text_ctx": 448}
    sizes = {"state": 512, "head": 8, "layer": 6}
    dims |= {f"n_{part}_{name}": size for part in ("audio", "text") for name, size in sizes.items()}
    model = whisper.model.Whisper(whisper.ModelDimensions(**dims))
    torch.save({"dims": dims, "model_state_dict": model.state_dict()}, tmp_path / "base.pt")
    model = f"asr.model={tmp_path / 'base.pt'}"
    with pytest.raises(SystemExit) as ended:
        import_script("concurrent_graphs").main(["--replays", "300", model, "train.compile=false"])
    assert ended.value.code == 0


def test_in_half_precision_it_hears_the_same(teacher, whisper_checkpoint):
    """As on a GPU. The same tokens are read, and written, since none of the logits is near another."""
    half = WhisperTeacher(AsrConfig(model=whisper_checkpoint), max_sec=2.0, device="cpu")
    half.to_half()
    waveform, lengths = clips()
    heard = []
    for one in (teacher, half):
        features = one.model.encoder(one.mel(waveform, lengths).to(one.dtype))
        tokens, n_text = one.transcribe(features)
        heard.append([tokens, n_text, *one.read(heard[0][0] if heard else tokens, features)])
    for a, b in zip(*heard, strict=True):
        assert a.shape == b.shape and (a.float() - b.float()).norm() < 1e-2 * a.float().norm()
