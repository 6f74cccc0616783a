"""The table of one run, of several, and of README.md: one builder.

    python results/table.py --out runs/cifar10-laptop --split test    # its report.md; prints the table
    python results/table.py --publish                # results/report.md and README.md, from runs/cifar10-*

Runs beside it that differ in nothing but the seed (OUT-seed1, OUT-seed2, ...) are counted in: mean ± standard
deviation. report.template.md says in braces which number it wants, so that none is typed by hand:

    {laptop finetune}                     a row's value
    {laptop finetune:training.train}      another entry of the row
    {laptop finetune - finetune_scratch}  how much higher one is than another, in points, seed by seed; with a
                                          star if that is more than the seeds' luck explains
    {report finetune}                     the coursework report's number
    {table}  {commands}                   every row; what was typed for the first run
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import statistics
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import vit  # noqa: E402

# row | what it is | its control: the row that it is compared with (empty: none)
LINES = """
pixels_probe | linear probe of raw pixels |
untrained_probe | linear probe of an untrained encoder | pixels_probe
infonce_probe | linear probe after InfoNCE | pixels_probe
m_probe | linear probe after Model M, which went on from InfoNCE | infonce_probe
m_alone_probe | linear probe after Model M without InfoNCE | pixels_probe
finetune_scratch | trained on labels from scratch |
finetune_infonce | fine-tuned from InfoNCE, without Model M | finetune_scratch
finetune | fine-tuned from Model M | finetune_infonce
finetune_scratch_13 | from scratch, as many epochs as finetune has behind it | finetune
clips_1 | clips alone, one temporal block |
clips_2 | clips alone, two temporal blocks | clips_1
video_1 | clips and each of their images by itself, one temporal block | clips_1
video_2 | the same, two temporal blocks | video_1
video_divided | the same, factorised self-attention in two blocks | video_2
captions_WHO | WHO captions: the class that they name, no training |
fusion_WHO_text_only | WHO captions: text only | captions_WHO
fusion_WHO_image_only | WHO captions: image only, trained for as long |
fusion_WHO | WHO captions: fusion | fusion_WHO_image_only
fusion_WHO_tokens | WHO captions: fusion, attention over words | fusion_WHO_image_only
fusion_WHO_shuffled | WHO captions: fusion, another image's caption | fusion_WHO_image_only
fusion_WHO_bound | WHO captions: a regression on image-only logits and class named | fusion_WHO_bound:without
cka_before | CKA of CLS across the last attention, before fine-tuning |
cka_after | the same, after fine-tuning | cka_before
maps_before | entropy of the CLS-patch maps, before fine-tuning |
maps_after | the same, after fine-tuning | maps_before
"""
TABLE = {}
for line in LINES.strip().split("\n"):
    for who in ("tiny", "blip"):
        row, words, control = (cell.strip() for cell in line.replace("WHO", who).split("|"))
        TABLE[row] = (words, control)
REPORTED = {"infonce_probe": 0.4008, "m_probe": 0.3851, "finetune": 0.4029, "clips_1": 0.4404}
REPORTED |= {"clips_2": 0.4244, "fusion_blip": 0.7013, "cka_before": 0.8698, "cka_after": 0.7353}
NOTES = """Epochs: of the last training. A probe reads cls or the mean of the patch tokens, as is better on
the validation split: in brackets, what the seeds chose. Tiny captions are not BLIP's, which the report used:
a small captioner of the same library class wrote them, trained here on the training labels; they hold no
knowledge from outside. The regression is logistic and fitted on validation images; its control is that of the
logits alone. A star: the mean of the differences is further from zero than the seeds' luck takes it in 19 of
20 cases (Student's t)."""

CONTROLS = ["pixels_probe", "finetune_scratch", "finetune_infonce", "video_1", "video_2"]
CONTROLS += ["fusion_tiny_image_only", "fusion_tiny", "fusion_blip_image_only"]
# seeds -> Student's t, 97.5 %, in standard errors of a mean; of six for more, which is cautious
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57}
Rows = dict[str, dict]  # a run's rows, by name


def read_rows(out: pathlib.Path, split: str) -> Rows:
    """The rows of a run that were measured on that split, by their plain names."""
    rows = {}
    for path in sorted((out / "rows").rglob("*.json")):
        name = path.relative_to(out / "rows").as_posix().removesuffix(".json")
        if (row := json.loads(path.read_text()))["split"] == split:
            rows[name.removesuffix("_validation")] = row
    return rows


def runs_of(out: pathlib.Path, split: str = "test") -> list[Rows]:
    """The rows of a run; then, of the runs beside it, those that differ from its own in nothing but the seed:
    images, code, precision, and the command without its seed and folder are the same."""

    def recipe(row: dict) -> list:
        """What must be the same."""
        command = re.sub(r"--seed \d+|-seed\d+", "", row["command"])
        return [command, *(row[key] for key in ("images", "code", "precision"))]

    runs = [read_rows(out, split)]
    for folder in sorted(out.parent.glob(f"{out.name}-seed*")):
        rows = read_rows(folder, split) if re.fullmatch(r"-seed\d+", folder.name[len(out.name) :]) else {}
        same = [name for name, row in runs[0].items() if name in rows and recipe(rows[name]) == recipe(row)]
        runs.append({name: rows[name] for name in same})
    return runs


def in_words(name: str, values: list[float], sign: str = "") -> str:
    """Numbers as tables have them: accuracies in percent, CKA and entropy plain; of several the mean and
    standard deviation; differences, with a sign, in points."""
    if not values:
        return ""
    scale, digits = (1, 4) if re.search("(^|_)(cka|maps)_", name) else (100, 2)
    spread = f" ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * statistics.mean(values):{sign}.{digits}f}{spread}{'' if scale == 1 or sign else ' %'}"


def entry(rows: Rows, name: str):
    """A row's value, or "finetune:training.train", another of its entries; None if there is no such row."""
    name, _, path = name.partition(":")
    found = rows.get(name)
    for step in (path or "value").split("."):
        found = found and found.get(step)
    return found


def number(runs: list[Rows], name: str) -> str:
    """An entry over the seeds."""
    found = [x for rows in runs if (x := entry(rows, name)) is not None]
    if name.endswith((":images", ":epochs", ":feature")):
        return ", ".join(str(x) for x in dict.fromkeys(found))
    return in_words(name, found)


def difference(runs: list[Rows], name: str, control: str) -> str:
    """How much higher an entry is than another. Each seed's two are compared with each other: what the seed
    does to both falls out. A star: the seeds' luck does not explain it (Student's t, 95 %)."""
    pairs = [(entry(rows, name), entry(rows, control)) for rows in runs]
    found = [x - y for x, y in pairs if None not in (x, y)]
    star = ""
    if len(found) > 1:
        error = statistics.stdev(found) / len(found) ** 0.5
        star = " *" if abs(statistics.mean(found)) > STUDENT[min(len(found), 6)] * error else ""
    return in_words(name, found, "+") + star


def table(profiles: dict[str, list[Rows]]) -> list[list[str]]:
    """All rows of some runs, by the runs' names: lines of cells."""
    heads = sum([[name, "epochs", "minus control"] for name in profiles], [])
    lines = [["row", "report", *heads, "what it is", "control"]]
    there = list(dict.fromkeys(name for runs in profiles.values() for name in runs[0]))
    for name in [*(name for name in TABLE if name in there), *(name for name in there if name not in TABLE)]:
        words, control = TABLE.get(name, ("", ""))
        line = [name, in_words(name, [REPORTED[name]] if name in REPORTED else [])]
        for runs in profiles.values():
            line += [number(runs, name), number(runs, f"{name}:epochs"), difference(runs, name, control)]
        features = dict.fromkeys(number(runs, f"{name}:feature") for runs in profiles.values())
        words += f" ({'; '.join(filter(None, features))})" if any(features) else ""
        lines.append([*line, words, control if control.partition(":")[0] in there else ""])
    return lines


def markdown(lines: list[list[str]]) -> str:
    """Lines of cells as a table."""
    rule = ["---", *["---:"] * (len(lines[0]) - 3), "---", "---"]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def about(runs: list[Rows]) -> str:
    """Where the numbers of some runs come from; a mixture is said to be one."""
    rows, lines = [row for rows in runs for row in rows.values()], []
    for key in ("provenance", "split", "seed", "limit", "device", "torch"):
        found = list(dict.fromkeys(str(row[key]) for row in rows))
        mixed = " (A MIXTURE: each row's own is in rows/)" if len(found) > 1 and key != "seed" else ""
        lines.append(f"- {key}: {', '.join(found)}{mixed}")
    if any(row["limit"] for row in rows):
        lines.append("- **ONLY A FEW IMAGES OF EACH SPLIT: THESE NUMBERS MEAN NOTHING.**")
    return "\n".join(lines)


def commands(out: pathlib.Path) -> str:
    """What run_all.sh typed, in order, but for the device."""
    path = out / "commands.txt"
    typed = path.read_text() if path.exists() else "these rows were made by hand; rows/ has their commands\n"
    return "    " + typed.replace(" --device cuda", "").rstrip().replace("\n", "\n    ")


def report(out: pathlib.Path, split: str) -> None:
    """Write out/report.md, and print its table."""
    runs = runs_of(out, split)
    if not runs[0]:
        sys.exit(
            f"{out} has no rows of the {split} split yet; a stage writes them (--split test or validation)"
        )
    lines = table({"ours": runs})
    parts = [f"# Results of {out.name}", about(runs), markdown(lines), NOTES, commands(out)]
    parts += [f"![{path.stem}](figures/{path.name})" for path in sorted((out / "figures").glob("*.*"))]
    with vit.whole_file(out / "report.md") as file:
        file.write(("\n\n".join(parts) + "\n").encode())
    for row, reported, ours, epochs, above, *_ in lines:
        print(f"{row:<24}{reported:>8}{ours:>17}{epochs:>7}{above:>18}")
    print(f"\n{about(runs)}\n\nwith its commands: {out / 'report.md'}; pictures: {out / 'figures'}")


def filled(page: str, profiles: dict[str, list[Rows]]) -> str:
    """A page with its placeholders filled in."""

    def fill(found: re.Match) -> str:
        """One placeholder's text."""
        profile, name, *more = found[1].split()
        if profile == "report":
            return in_words(name, [REPORTED[name]])
        runs = profiles.get(profile, [{}])
        return (difference(runs, name, more[1]) if more else number(runs, name)) or "not measured"

    page = page.replace("{table}", markdown(table(profiles)))
    return re.sub(r"\{((?:report|laptop|full) [^{}]+)\}", fill, page)


def publish(root: pathlib.Path) -> None:
    """Write results/ and README.md's table anew from runs/cifar10-laptop and -full."""
    folders = {name: root / f"runs/cifar10-{name}" for name in ("laptop", "full")}
    folders = {name: out for name, out in folders.items() if (out / "rows").exists()}
    profiles = {name: runs_of(out) for name, out in folders.items()}
    page = filled((root / "results/report.template.md").read_text(), profiles)
    # README.md shows the rows that the report has, their controls, and some beside them
    shown = [line for line in table(profiles) if line[1] or line[0] in CONTROLS]
    readme, block = (root / "README.md").read_text(), markdown(shown)
    readme = re.sub(r"(?s)(<!-- results -->\n).*(\n<!-- end -->)", lambda m: m[1] + block + m[2], readme)
    pages = {"results/report.md": page.replace("{commands}", commands(next(iter(folders.values()))))}
    pages |= {"README.md": readme, "results/results.json": json.dumps(profiles, indent=1) + "\n"}
    for name, content in pages.items():
        with vit.whole_file(root / name) as file:
            file.write(content.encode())
    for path in [path for out in reversed(folders.values()) for path in (out / "figures").glob("*.*")]:
        with vit.whole_file(root / "results/figures" / path.name) as file:
            file.write(path.read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(parents=[vit.common_options()])
    parser.add_argument("--publish", action="store_true", help="write the published pages")
    args = parser.parse_args()
    publish(ROOT) if args.publish else report(pathlib.Path(args.out), args.split)


if __name__ == "__main__":
    main()
