"""The workers of vLLM-Omni 0.30.0 on a CPU, and what they compute, written down. Everything in this repository that
touches the engine's private names is in this file: another version of the engine needs another look at it.

SERVE_TEST_RECORD=DIR: the language model's worker writes there
    encode_N.pt     of the N-th reference: waveform [1, 1, T], latent [1, D, L], codes [1, 37, L], rows [L + 1, dim]
    prompt_N.pt     of the N-th request: embeddings [S, dim]
    frame_N_K.pt    of its K-th frame: hidden [1, dim], noise [1, 36], ids [1, 37]
and takes the noise of frame K from DIR/noise.pt [frames, 36], where that is.
SERVE_TEST_FP32=1: what is bf16 in the engine whatever --dtype says becomes float32.
"""

import os
from pathlib import Path
from unittest.mock import patch

import torch
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm_omni.worker.base import OmniGPUWorkerBase
from vllm_omni.worker.gpu_ar_model_runner import GPUARModelRunner
from vllm_omni.worker.gpu_generation_model_runner import GPUGenerationModelRunner
from vllm_omni.worker.mixins import OmniWorkerMixin


class _LanguageModelRunner(GPUARModelRunner, CPUModelRunner):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._postprocess_tensors()


class _CodecRunner(GPUGenerationModelRunner, CPUModelRunner):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._postprocess_tensors()


class _Worker(OmniWorkerMixin, CPUWorker):
    encoder_loaded = OmniGPUWorkerBase.encoder_loaded  # what the gate for ref_audio asks

    def init_device(self) -> None:
        if os.environ.get("SERVE_TEST_FP32"):
            compute_in_fp32()
        if os.environ.get("SERVE_TEST_RECORD"):
            record(Path(os.environ["SERVE_TEST_RECORD"]))
        self.use_v2_model_runner = False  # vLLM-Omni's hooks are in the first one
        super().init_device()
        self.model_runner = self.model_runner_cls(self.vllm_config, self.device)


class LanguageModelWorker(_Worker):
    model_runner_cls = _LanguageModelRunner


class CodecWorker(_Worker):
    model_runner_cls = _CodecRunner


def compute_in_fp32() -> None:
    from vllm_omni.model_executor.models.voxtral_tts import voxtral_tts_audio_generation, voxtral_tts_audio_tokenizer

    Codec = voxtral_tts_audio_tokenizer.VoxtralTTSAudioTokenizer
    Generation = voxtral_tts_audio_generation.VoxtralTTSAudioGenerationForConditionalGeneration
    load_weight, encode, decode, mm_logits = (
        Codec.load_weight,
        Codec._forward_encoder,
        Codec.decode,
        Generation.compute_mm_logits,
    )

    def without_autocast(self, x):
        with torch.autocast("cpu", enabled=False):
            return encode(self, x)

    def same_dtype(self, hidden_states, cfg_alpha):
        ends, codes = mm_logits(self, hidden_states, cfg_alpha)
        return ends.to(hidden_states.dtype), codes

    Codec.load_weight = lambda self, weight: load_weight(self, (weight[0], weight[1].float()))
    Codec._forward_encoder = without_autocast
    Codec.decode = lambda self, codes, dtype: decode(self, codes, torch.float32)
    Generation.compute_mm_logits = same_dtype


def record(folder: Path) -> None:
    from vllm_omni.model_executor.models.voxtral_tts import (
        voxtral_tts,
        voxtral_tts_audio_generation,
        voxtral_tts_audio_tokenizer,
    )

    Codec = voxtral_tts_audio_tokenizer.VoxtralTTSAudioTokenizer
    Flow = voxtral_tts_audio_generation.FlowMatchingAudioTransformer
    Model = voxtral_tts.VoxtralTTSForConditionalGeneration
    forward_encoder, tokenize, encode, preprocess, flow = (
        Codec._forward_encoder,
        Codec._tokenize_audio,
        Codec.encode_waveforms,
        Model.tts_preprocess,
        Flow.forward,
    )
    noise = torch.load(folder / "noise.pt") if (folder / "noise.pt").exists() else None
    encoded, counts = {}, {"encode": 0, "request": -1, "frame": 0}

    def keep_latent(self, x):
        encoded["latent"] = forward_encoder(self, x)
        return encoded["latent"]

    def keep_codes(self, x):
        encoded["waveform"], encoded["codes"] = x, tokenize(self, x)
        return encoded["codes"]

    def keep_rows(self, x):
        rows = encode(self, x)
        torch.save({**encoded, "rows": rows[0]}, folder / f"encode_{counts['encode']}.pt")
        counts["encode"] += 1
        return rows

    def keep_prompt(self, input_ids, input_embeds, **info):
        is_prompt = self._is_prefill_step(info, input_ids)
        result = preprocess(self, input_ids, input_embeds, **info)
        if is_prompt:
            counts["request"], counts["frame"] = counts["request"] + 1, 0
            torch.save({"embeddings": result[1].clone()}, folder / f"prompt_{counts['request']}.pt")
        return result

    def keep_frame(self, llm_hidden, cfg_alpha):
        randn, drawn = torch.randn, []

        def draw(*size, **options):
            drawn.append(
                randn(*size, **options)
                if noise is None
                else noise[counts["frame"]].expand(size).to(options["dtype"], copy=True)
            )
            return drawn[0]

        with patch.object(torch, "randn", draw):
            ids = flow(self, llm_hidden, cfg_alpha)
        if counts["request"] >= 0:  # the engine warms up first
            torch.save(
                {"hidden": llm_hidden.clone(), "noise": drawn[0], "ids": ids},
                folder / f"frame_{counts['request']}_{counts['frame']:04d}.pt",
            )
        counts["frame"] += 1
        return ids

    Codec._forward_encoder, Codec._tokenize_audio, Codec.encode_waveforms = keep_latent, keep_codes, keep_rows
    Model.tts_preprocess, Flow.forward = keep_prompt, keep_frame  # before __init__ binds tts_preprocess
