"""``hypersd-bench study``: plan, make and serve a study; export and analyse its votes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click

from hypersd_bench.errors import InputError, unknown_name

FOLDER = click.Path(path_type=Path)
DB = click.option("--db", help="postgresql+psycopg://user@host/name instead of the study's own SQLite file.")
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def study() -> None:
    """Blind pairwise votes from people."""


@study.command()
@click.option("--effect", type=click.FloatRange(0, 1), default=0.6, show_default=True, help="Preference rate to show.")
@click.option("--raters", type=click.IntRange(1), default=30, show_default=True, help="People who will vote.")
@click.option("--prompts", type=click.IntRange(1), default=40, show_default=True, help="Prompts of each comparison.")
@click.option("--comparisons", type=click.IntRange(1), default=1, show_default=True, help="Tested together (Holm).")
@click.option("--power", type=click.FloatRange(0.5, 0.999), default=0.8, show_default=True, help="Chance to show it.")
@click.option(
    "--icc-rater", type=click.FloatRange(0, 1), default=0.05, show_default=True, help="Likeness of a rater's votes."
)
@click.option(
    "--icc-prompt", type=click.FloatRange(0, 1), default=0.1, show_default=True, help="Likeness of a prompt's."
)
@click.option("--like", type=FOLDER, help="Take both likenesses from the votes of this study.")
@AS_JSON
def plan(effect: float, as_json: bool, like: Path | None, **settings: Any) -> None:
    """Say how many votes a comparison needs to show a preference rate, clustering counted."""
    from user_study.planning import likeness, plan_lines, plan_study

    if effect in (0, 0.5, 1):
        raise InputError(
            f"--effect {effect:g}: name the smallest rate worth showing, such as 0.6; 0.5 is no preference"
        )
    if like is not None:
        from user_study.study import load_study

        opened = load_study(like)
        votes = opened.open_votes(must_exist=True)
        settings |= likeness(opened.design, votes.votes())
        votes.close()
    made = plan_study(effect, **settings)
    click.echo(json.dumps(made, indent=2) if as_json else "\n".join(plan_lines(made)))


@study.command()
@click.argument("run", type=FOLDER)
@click.option("--out", type=FOLDER, required=True, help="The study's folder, which must not exist.")
@click.option("--pairs", help="What meets: a@4:b@4,c@1:d@1.  [default: the baseline against all at each step count]")
@click.option("--pairs-each", type=click.IntRange(1), default=40, show_default=True, help="Pairs of each comparison.")
@click.option(
    "--per-rater", type=click.IntRange(1), default=40, show_default=True, help="Pairs one rater gets at most."
)
@click.option(
    "--votes-per-pair", type=click.IntRange(1), help="Votes on each pair at most.  [default: what the raters give]"
)
@click.option("--raters", type=click.IntRange(1), default=30, show_default=True, help="People expected to vote.")
@click.option(
    "--effect", type=click.FloatRange(0.5, 1), default=0.6, show_default=True, help="Preference rate to show."
)
@click.option(
    "--criteria", default="overall", show_default=True, help="Asked of each pair: overall,alignment,appeal,defects."
)
@click.option(
    "--practice", type=click.IntRange(0, 20), default=2, show_default=True, help="Practice pairs, with feedback."
)
@click.option(
    "--gold-every", type=int, default=10, show_default=True, help="One item of so many has a known answer; 0: none."
)
@click.option(
    "--repeat-every", type=int, default=20, show_default=True, help="One item of so many is asked again; 0: none."
)
@click.option(
    "--lease", type=click.IntRange(1, 24 * 60), default=20, show_default=True, help="Minutes a pair waits for its vote."
)
@click.option(
    "--policy",
    type=click.Choice(["balanced", "adaptive"]),
    default="balanced",
    show_default=True,
    help="Adaptive asks more of what is undecided.",
)
@click.option("--rule", multiple=True, help="A rule that flags raters, as gold_share=0.7; may be given again.")
@click.option("--wording", type=FOLDER, help="A YAML file with your own title, consent, instructions and questions.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of what is drawn: pairs, order, sides.")
@AS_JSON
def new(
    run: Path, out: Path, criteria: str, wording: Path | None, rule: tuple[str, ...], as_json: bool, **o: Any
) -> None:
    """Make a study of RUN's images: its design, fixed and hashed, and the images as raters get them."""
    from hypersd_bench.store import RunStore
    from user_study.making import Plan, make_design
    from user_study.planning import smallest_shown
    from user_study.study import new_study
    from user_study.wording import load_wording

    chosen = Plan(o["pairs"], o["pairs_each"], o["per_rater"], o["votes_per_pair"], o["raters"], o["effect"], o["seed"])
    session = {
        "practice": o["practice"],
        "gold_every": _interval(o["gold_every"], 3, "--gold-every"),
        "repeat_every": _interval(o["repeat_every"], 4, "--repeat-every"),
        "lease_minutes": o["lease"],
        "policy": o["policy"],
    }
    asked = _criteria(criteria)
    store = RunStore.open(run)
    design = make_design(store, chosen, asked, load_wording(wording, asked), session, _rules(rule))
    made = new_study(store, out, design)
    shown = smallest_shown(design)
    told = {
        "study": str(out),
        "hash": design.hash,
        "comparisons": list(design.comparisons),
        "pairs": len(design.pairs),
        "votes_per_pair": design.session.votes_per_pair,
        "pairs_per_rater": design.session.pairs_per_rater,
        "smallest_rate_shown": shown,
    }
    if as_json:
        click.echo(json.dumps(told, indent=2))
        return
    count = len(design.comparisons)
    click.echo(
        f"{out}: {told['pairs']} pairs of {count} comparison{'s' if count != 1 else ''}, at most "
        f"{told['votes_per_pair']} votes on each and {told['pairs_per_rater']} pairs for each rater"
    )
    click.echo(_reach(shown, design.planned_rate))
    click.echo(f"design {made.design.hash} (say this hash where you preregister)")
    click.echo(f"Next: hypersd-bench study serve {out}")


@study.command()
@click.argument("folder", metavar="STUDY", type=FOLDER)
@click.option("--raters", type=click.IntRange(1, 100_000), required=True, help="How many links.")
@click.option("--base-url", required=True, help="Where raters reach the study, such as https://study.example.org")
@click.option(
    "--days", type=click.FloatRange(min=0, min_open=True), default=30, show_default=True, help="How long they hold."
)
@click.option("--out", type=FOLDER, help="A CSV file to write.  [default: print them]")
@AS_JSON
def links(folder: Path, raters: int, base_url: str, days: float, out: Path | None, as_json: bool) -> None:
    """Make signed links, one for each rater; whoever opens one votes as that rater, on any device."""
    from hypersd_bench.store import write_bytes
    from user_study.links import make_link
    from user_study.study import load_study

    opened = load_study(folder)
    if not base_url.startswith(("http://", "https://")):
        raise InputError(f"--base-url {base_url!r} is no address; write https://study.example.org")
    if out is not None and out.exists():
        raise InputError(f"{out} exists; name another file with --out")
    expires = datetime.now(UTC) + timedelta(days=days)
    tokens = [make_link(opened.key, expires)[1] for _ in range(raters)]
    base = base_url.rstrip("/").removesuffix("/study")
    lines = [f"{base}/r/{token}" for token in tokens]
    if as_json:
        click.echo(json.dumps([{"link": line, "expires": expires.isoformat(timespec="minutes")} for line in lines]))
        return
    if out is None:
        click.echo("\n".join(lines))
        return
    rows = [f"{i},{line},{expires.isoformat(timespec='minutes')}" for i, line in enumerate(lines, 1)]
    write_bytes(out, "\n".join(["number,link,expires", *rows, ""]).encode())
    click.echo(f"{raters} links in {out}; each is a secret of its rater")


@study.command()
@click.argument("folder", metavar="STUDY", type=FOLDER)
@click.option("--port", default=7860, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@DB
@click.option("--invited-only", is_flag=True, help="Only links of 'study links' let in.")
@click.option("--json", "as_json", is_flag=True, help="Print where it listens as JSON.")
def serve(folder: Path, port: int, host: str, db: str | None, invited_only: bool, as_json: bool) -> None:
    """Serve STUDY: the rating page, the admin page, health routes. Ctrl-C stops it; start it again at any time."""
    from user_study.serving import serve_until_stopped
    from user_study.study import load_study

    serve_until_stopped(load_study(folder), host, port, db, invited_only, as_json)


@study.command()
@click.argument("folder", metavar="STUDY", type=FOLDER)
@click.option(
    "--format",
    "form",
    type=click.Choice(["csv", "jsonl", "parquet"]),
    default="csv",
    show_default=True,
    help="Of the file; parquet keeps the types.",
)
@click.option("--out", type=FOLDER, help="The file to write, which must not exist.  [default: STUDY/votes.FORMAT]")
@DB
@AS_JSON
def export(folder: Path, form: str, out: Path | None, db: str | None, as_json: bool) -> None:
    """Write STUDY's votes, one row for each vote and criterion, raters under pseudonyms, with a codebook."""
    from user_study.export import export_rows, write_export
    from user_study.study import load_study

    opened = load_study(folder)
    target = out or folder / f"votes.{form}"
    if not as_json and target.exists():
        raise InputError(f"{target} exists; name another file with --out")
    votes = opened.open_votes(db, must_exist=True)
    rows = export_rows(opened.design, votes.votes(), opened.key)
    votes.close()
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    write_export(target, rows, form)
    click.echo(f"{len(rows)} rows in {target}")


@study.command()
@click.argument("folder", metavar="STUDY", type=FOLDER)
@click.option("--run", type=FOLDER, help="Where the run is now, if it was moved.")
@click.option("--no-metrics", is_flag=True, help="Leave out the comparison with the run's metrics.")
@DB
@AS_JSON
def analyse(folder: Path, run: Path | None, no_metrics: bool, db: str | None, as_json: bool) -> None:
    """Preference rates, a ranking, agreement, rater quality and sensitivity; kept in STUDY/analysis.json."""
    from hypersd_bench.store import write_bytes, write_json
    from user_study.analysis import analyse as analyse_votes
    from user_study.analysis import card_markdown, lines
    from user_study.study import load_study

    opened = load_study(folder)
    votes = opened.open_votes(db, must_exist=True)
    try:
        store = None if no_metrics else _run_of(opened, run)
        found = analyse_votes(opened.design, votes.votes(), votes.assignments(), votes.raters(), store)
    finally:
        votes.close()
    write_json(folder / "analysis.json", found.to_json())
    write_bytes(folder / "card.md", card_markdown(found).encode())
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
        return
    click.echo("\n".join(lines(found)))
    click.echo(f"\nall of it: {folder / 'analysis.json'}; for the paper: {folder / 'card.md'}")


def _reach(shown: float, planned: float) -> str:
    reach = (
        f"so many votes can show a preference of {shown:.1%} (80 % power)" if shown < 1 else "too few votes to show any"
    )
    if shown <= planned:
        return reach
    return f"{reach}, not the planned {planned:.0%}: see study plan; then more raters, pairs, or --per-rater"


def _run_of(opened: Any, run: Path | None) -> Any:
    """The study's run; None, said on the error stream, where it is no longer where it was and nobody names it."""
    try:
        return opened.run(run)
    except InputError as error:
        if run is not None:
            raise
        click.echo(f"without the run's metrics: {error}", err=True)
        return None


def _interval(value: int, least: int, option: str) -> int:
    if value != 0 and value < least:
        raise InputError(f"{option} {value}: 0 for none, or at least {least}")
    return value


def _criteria(text: str) -> tuple[str, ...]:
    from user_study.design import CRITERIA

    asked = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in asked:
        if name not in CRITERIA:
            raise unknown_name("criterion", name, CRITERIA, "--criteria")
    if not asked:
        raise InputError(f"--criteria is empty; known: {', '.join(CRITERIA)}")
    return asked


def _rules(given: tuple[str, ...]) -> Any:
    from user_study.design import Rules

    kinds: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "bool": _truth}
    known = {field.name: kinds[str(field.type)] for field in fields(Rules)}
    values = {}
    for text in given:
        name, _, value = text.partition("=")
        if name not in known:
            raise unknown_name("rule", name, known, "--rule")
        try:
            values[name] = known[name](value)
        except ValueError:
            raise InputError(f"--rule {text}: {value!r} is no value for {name}") from None
        if name.endswith(("_share", "_p")) and not 0 <= values[name] <= 1:
            raise InputError(f"--rule {text}: {name} must be between 0 and 1")
    return Rules(**values)


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"
