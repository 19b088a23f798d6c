"""Builds ``report.html``: one file that needs no network, no script and no other file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mmalign import __version__
from mmalign.report import answers, files, learnt_mask, people, pictures, provenance, reports, results, training
from mmalign.report.folder import RunData, read_run
from mmalign.report.section import Section

TEMPLATES = Path(__file__).parent / "templates"
SECTIONS: tuple[Callable[[RunData], Section], ...] = (
    results.findings,
    people.people,
    learnt_mask.learnt_mask,
    pictures.before_after,
    reports.reports,
    answers.answers,
    results.rewards,
    training.curves,
    pictures.timeline,
    provenance.refused,
    provenance.settings,
    provenance.environment,
)
"""The page from top to bottom, below the headline."""


def build_report(run: Path | str) -> Path:
    """Write ``report.html`` from what a run folder holds; parts that are missing are said to be missing.

    A ``summary.json`` that has no warnings yet gets those that the report found.

    Returns:
        The file written.

    Raises:
        DataError: no such folder, or it cannot be written.
    """
    folder = Path(run)
    path = folder / "report.html"
    read = read_run(folder)
    files.write_text(path, render(read))
    if read.summary and "warnings" not in read.summary:
        files.merge_json(folder / "summary.json", {"warnings": [finding.text for finding in read.findings]})
    return path


def render(run: RunData) -> str:
    """The page as text. Everything that comes from the run is escaped."""
    sections = [section for build in SECTIONS for section in [build(run)] if _worth_showing(run, section)]
    return render_page(results.hero(run, _claim(run)), sections)


def render_page(hero: Section, sections: Sequence[Section]) -> str:
    """A self-contained page of these parts."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        hero=hero, sections=sections, style=(TEMPLATES / "style.css").read_text("utf-8"), version=__version__
    )


def _claim(run: RunData) -> tuple[str, str]:
    """Headline and lede of runs whose outcome is no comparison of pictures or answers with the base."""
    if told := people.headline(run):
        return told, "Everybody's own stated taste is the judge, on held-out prompts from equal noise; intervals are below."
    if told := learnt_mask.headline(run):
        return told, "What that prevents and costs shows in fine-tuning under it: mmalign evaluate-guard (docs/freezing.md)."
    return "", ""


def _worth_showing(run: RunData, section: Section) -> bool:
    """A page without warnings needs no empty box of warnings; pictures from noise belong to runs that make pictures, answers
    to runs that answer. Every other section says what is missing."""
    if section.id == "people":
        return people.is_personal(run) or not section.missing
    if section.id in ("pictures", "rewards") and section.missing and people.headline(run):
        return False  # compared person by person
    if section.id == "mask":
        return learnt_mask.makes_mask(run)
    if section.id in ("pictures", "rewards", "timeline") and learnt_mask.makes_mask(run):
        return False
    if section.id in ("answers", "pictures", "timeline") and section.missing:
        return section.id == "answers" if run.answers else section.id != "answers"
    if section.id == "reports":
        return not section.missing
    return section.id != "notes" or bool(section.values["findings"] or section.values["problems"])
