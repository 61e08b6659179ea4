"""demo.py: what it hands to the scripts that it calls. `make demo`, which CI runs, is all of it."""

from pathlib import Path

import pytest

import demo
from voxtral.config import EncoderConfig, load_config


class TrainingBegins(Exception):
    pass


@pytest.mark.parametrize("codes", [None, "presets"])
def test_clips_go_into_the_run_folder_and_phase_1_reads_them_there(monkeypatch, tmp_path, speaker_checkpoint, codes):
    def begin(arguments):
        raise TrainingBegins(load_config(EncoderConfig, arguments[1], arguments[2:]))

    made = []
    monkeypatch.setattr(demo.generate_clips, "main", made.extend)
    monkeypatch.setattr(demo.train_encoder, "main", begin)
    monkeypatch.chdir(Path(demo.__file__).parent)
    changes = [f"output_dir={tmp_path}", *([f"match.codes={codes}"] if codes else [])]
    with pytest.raises(TrainingBegins) as caught:
        demo.main([f"--speaker-model={speaker_checkpoint}", *changes])
    config, generated = caught.value.args[0], str(tmp_path / "generated")
    assert f"--output={generated}" in made and config.data.sources[1].path == generated
    assert config.match.codes == (codes or generated)
