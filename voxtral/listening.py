"""A page to listen to clones: one HTML file without scripts beside its wavs and pictures, opened from disk."""

import math
from html import escape
from pathlib import Path
from urllib.parse import quote

import soundfile
from torch import Tensor

from voxtral.audio import SAMPLE_RATE
from voxtral.checkpoint import write_text
from voxtral.clones import Item
from voxtral.evaluation_report import number
from voxtral.plots import save_figure, spectrogram_figure
from voxtral.reference import prepare_reference

PICTURE_INCHES = (5, 2)  # small, so that its letters can be read in a column of the page
STYLE = """
:root { color-scheme: light dark; --back: #f6f7f9; --card: #fff; --ink: #1c2128; --soft: #667080; --line: #dde1e7;
  --accent: #2b6cb0; }
@media (prefers-color-scheme: dark) { :root { --back: #14171c; --card: #1e232a; --ink: #e6e9ee; --soft: #98a2b0;
  --line: #343b45; --accent: #7db4ec; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 72rem; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1rem; margin: 0; color: var(--accent); overflow-wrap: anywhere; }
h3 { font-size: .95rem; margin: 0 0 .3rem; }
a { color: var(--accent); }
.scroll, section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .5rem .8rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
td { white-space: pre; }
td:first-child { font-weight: 600; }
tr:last-child td { border-bottom: 0; }
section { margin: 1.2rem 0; padding: 1rem; }
blockquote { margin: .2rem 0 .9rem; font-size: 1.15rem; }
.takes { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
.take { min-width: 0; }
audio { width: 100%; height: 2.4rem; }
img { width: 100%; border-radius: 6px; background: #fff; margin-top: .4rem; display: block; }
p { margin: .3rem 0; }
.soft { color: var(--soft); font-size: .85rem; overflow-wrap: anywhere; }
"""


def recording_html(folder, stem: str, name: str, waveform: Tensor, notes: list[str] = ()) -> str:
    """Writes STEM.wav and its spectrogram STEM.png into `folder`, nothing for a waveform [0]; waveform [T] float32. A
    player and the picture on the page, with `notes` between them, such as scores."""
    player = picture = ""
    if len(waveform):
        soundfile.write(Path(folder) / f"{stem}.wav", waveform.clamp(-1, 1).numpy(), SAMPLE_RATE)
        figure = spectrogram_figure({name: waveform}, SAMPLE_RATE)
        figure.set_size_inches(PICTURE_INCHES)
        save_figure(figure, Path(folder) / f"{stem}.png")
        player = f'<audio controls preload="none" src="{quote(stem)}.wav"></audio>\n'
        picture = f'<img src="{quote(stem)}.png" alt="spectrogram: {escape(name)}">\n'
    else:
        notes = ["no audio", *notes]
    lines = "".join(f'<p class="soft">{escape(note)}</p>\n' for note in notes)
    return f'<div class="take">\n<h3>{escape(name)}</h3>\n{player}{lines}{picture}</div>\n'


def section_html(voice: str, text: str, recordings: list[str]) -> str:
    """A part of the page: a voice, what is said in it, recording_html() of its reference and of the clones."""
    return (
        f"<section>\n<h2>{escape(voice)}</h2>\n<blockquote>“{escape(text)}”</blockquote>\n"
        f'<div class="takes">\n{"".join(recordings)}</div>\n</section>\n'
    )


def _notes(row: dict) -> list[str]:
    """What the page says of a clone."""
    others = "" if math.isnan(row["others"]) else f" (other voices {row['others']:.2f})"
    lines = [f"similarity {row['own']:.2f}{others}, {row['seconds']:.1f} s"]
    if "wer" in row:
        lines.append(f"word errors {number(100 * row['wer'])} %: “{row['transcript']}”")
    return lines + ([] if row["ended"] else ["cut off at the length limit"])


def clone_sections(folder, items: list[Item], rows: list[dict], audio: dict) -> list[str]:
    """wavs and spectrograms of the first items -> their parts of the page. audio: system -> their clones [T]."""
    sections = []
    for i in range(len(next(iter(audio.values())))):
        waveform = prepare_reference(items[i].reference).waveform[0, 0]
        recordings = [recording_html(folder, f"clone_{i}_reference", "reference", waveform)]
        for place, (system, clones) in enumerate(audio.items()):
            notes = _notes(rows[len(items) * place + i])
            recordings.append(recording_html(folder, f"clone_{i}_{system}", system, clones[i], notes))
        sections.append(section_html(items[i].speaker, items[i].text, recordings))
    return sections


def write_page(
    path, title: str, intro_html: str, headers: list[str], table_rows: list[list[str]], sections: list[str]
) -> None:
    """Writes the page. All but intro_html and sections is text, in which < and & stand for themselves, and a line break
    in the table for one; the first column names the rows."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in headers)
    rows = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table_rows)
    write_text(
        path,
        f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{intro_html}
<div class="scroll"><table>
<tr>{head}</tr>
{rows}
</table></div>
{"".join(sections)}</body>
</html>
""",
    )
