"""research/clone_recipes.sh: the settings of every command that it runs are ones that exist."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

from voxtral.config import (
    EncoderConfig,
    FullPipelineConfig,
    check_encoder_config,
    check_full_pipeline_config,
    load_config,
)

ROOT = Path(__file__).parents[1]
STUB = """#!{python}
import json, sys
from pathlib import Path
for word in sys.argv:
    if word.startswith("output_dir=") and "train_encoder.py" in sys.argv:
        Path(word.partition("=")[2], "checkpoints").mkdir(parents=True)
with open("{calls}", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
"""


def test_every_encoder_is_trained_and_speaks(tmp_path):
    speech = tmp_path / "speech"
    speech.mkdir()
    command = [ROOT / "research/clone_recipes.sh", speech, "base", tmp_path / "out"]
    assert subprocess.run(command, capture_output=True).returncode == 2
    for name in ("talk.csv", "eval.csv"):
        (speech / name).write_text("path,speaker,text\n")
    (tmp_path / "python").write_text(STUB.format(python=sys.executable, calls=tmp_path / "calls"))
    (tmp_path / "python").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(command, check=True, timeout=60, env=environment, capture_output=True)
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    trained = {}
    for script, *words in calls:
        overrides = [
            word
            for word in words
            if "=" in word and not word.startswith("--") and words[words.index(word) - 1][:2] != "--"
        ]
        if script == "train_encoder.py":
            config = load_config(EncoderConfig, ROOT / words[words.index("--config") + 1], overrides)
            check_encoder_config(config)
            trained[Path(config.output_dir).name] = config
        if script == "train_full_pipeline.py":
            check_full_pipeline_config(
                load_config(FullPipelineConfig, ROOT / words[words.index("--config") + 1], overrides)
            )
    assert len(trained) == 11 and trained["few"].train.max_steps == 800 and trained["paper"].loss.mel == 0
    assert [config.loss.codes for name, config in trained.items() if "codes" in name] == [4] * 5
    assert all(len(config.data.sources) == 1 + bool(config.loss.codes) for config in trained.values())
    needs = next(words for script, *words in calls if script.endswith("clone_needs.py"))
    assert needs.count("--encoder") == len(trained) + 1
    judged = set(needs[needs.index("--speakers") + 1].split(","))
    with (ROOT / "assets/speech/talk.csv").open() as file:  # what `few` encoders hear
        in_the_demo = {row["speaker"] for row in csv.DictReader(file)}
    for config in trained.values():
        heard = in_the_demo if config.data.data_root == "assets/speech" else judged
        assert judged & heard <= set(config.data.validation.speakers)  # nothing was trained on a voice that is judged
