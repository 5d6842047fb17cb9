"""The report is one self-contained, escaped page, whatever is missing from its input."""

import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from safe_rlhf_jax import evaluation
from safe_rlhf_jax.data.oracles import Measure
from safe_rlhf_jax.evaluation import plots, provenance, score_plots, tables
from safe_rlhf_jax.evaluation import report as report_module
from safe_rlhf_jax.evaluation.evaluate import measured_pairs
from safe_rlhf_jax.evaluation.judges import OWN, add_averages, reward_units, views
from safe_rlhf_jax.evaluation.provenance import code_version
from safe_rlhf_jax.evaluation.report import Report, figures, summary_table, write_report
from safe_rlhf_jax.evaluation.responses import BEST, CHANGED, MOST_PROMPTS, UNSAFE, WORST, answers_of
from safe_rlhf_jax.evaluation.statistics import MOST_GROUPS, paired_win_rate, summarize

FIGURES = (
    "headline", "reward_cost", "quadrants", "distributions", "harm", "lengths", "training", "over_optimisation",
    "score_distributions",
)  # fmt: skip
MEASURES = (
    Measure("harm_rate", "harm, risky prompts", True, "↓"),
    Measure("harm_rate_redteam", "harm, red team", True, "↓"),
    Measure("helpfulness_benign", "helpfulness, benign", better="↑"),
    Measure("harm_rate_by_category", "harm by category", True),
)
CATEGORIES = ("privacy_violation", "theft", "fraud", "violence", "cybercrime", "drugs")
WORDS = [
    "first",
    "pick",
    "a",
    "sunny",
    "spot",
    "then",
    "water",
    "the",
    "small",
    "pot",
    "twice",
    "each",
    "week",
    "and",
    "keep",
    "the",
    "soil",
    "loose",
]


def make_samples(rng, *, harm=0.5, skill=0.6, oracle=True, prompts=120):
    """A policy that is harmful on a share `harm` of risky prompts, with scores that roughly agree."""
    samples = []
    for i in range(prompts):
        group = ("risky", "benign", "risky", "sensitive")[i % 4]
        split = "redteam" if i % 12 == 2 else "test"
        harmful = group == "risky" and rng.random() < harm
        helpfulness = float(np.clip(rng.normal(skill, 0.15), 0, 1))
        sample = {
            "prompt": f"How do I handle case {i} of my {group} request?",
            "response": " ".join(rng.choice(WORDS, size=8)),
            "group": group,
            "split": split,
            "category": CATEGORIES[i % len(CATEGORIES)] if group == "risky" else None,
            "reward": float(rng.normal(3 * skill - 1 + harmful, 0.6)),
            "cost": float(rng.normal({"risky": 2.0 if harmful else -2.0}.get(group, -4.0), 0.7)),
            "kl": float(rng.gamma(4, skill)),
            "length": int(rng.integers(8, 24)),
            "truncated": bool(rng.random() < 0.02),
            "helpfulness": helpfulness if oracle else None,
            "harmful": harmful if oracle else None,
            "severity": int(harmful) if oracle else None,
            "refusal": bool(rng.random() < 0.02) if oracle else None,
        }
        if oracle:
            name = "helpfulness_benign" if group != "risky" else "harm_rate" if split == "test" else "harm_rate_redteam"
            sample["measured"] = {name: harmful if group == "risky" else helpfulness}
            sample["measured"] |= {f"harm_rate_by_category/{sample['category']}": harmful} if group == "risky" else {}
        samples.append(sample)
    return samples


def make_report(*, prompts=120, steps=80, oracle=True):
    rng = np.random.default_rng(0)
    policies = {
        name: make_samples(rng, harm=harm, skill=skill, oracle=oracle, prompts=prompts)
        for name, harm, skill in (("SFT", 0.52, 0.6), ("PPO-Lag", 0.01, 0.8), ("PPO", 0.9, 0.85))
    }
    everything = [sample for samples in policies.values() for sample in samples]
    for sample in everything if oracle else ():
        doubt = sample["cost"] + rng.normal()
        sample["judged"] = {
            "reward/other": sample["reward"] + rng.normal(),
            "cost/other": doubt,
            "cost/third": doubt / 2,
        }
        sample["refusal_by"] = "oracle"
    add_averages(everything, reward_units(everything))
    right = measured_pairs((rng.normal(-1, 2, 90), rng.normal(1, 2, 90)), (np.ones(90), np.ones(90)), None, [])
    t = np.arange(steps)
    noise = rng.normal(0, 0.15, size=(4, steps))
    lagged = np.stack(
        [
            0.2 + 2.2 / (1 + np.exp(-(t - steps / 4) / (steps / 20))) * np.exp(-t / (3 * steps)),
            -1.7 + 2.2 * np.exp(-t / (steps / 5)) + noise[0],
            0.8 + 0.6 * (1 - np.exp(-t / (steps / 3))) + noise[1],
            3 * (1 - np.exp(-t / (steps / 3))) + noise[2] / 2,
        ]
    )
    keys = ("train/multiplier", "train/mean_cost", "train/reward", "train/kl")
    history = {"PPO-Lag": [{"step": int(i), **dict(zip(keys, map(float, lagged[:, i]), strict=True))} for i in t]}
    for i, row in enumerate(history["PPO-Lag"][:: max(steps // 4, 1)]):
        row |= {"eval/kl_mean": 0.7 * i, "eval/reward_mean": 0.3 * i, "eval/judge_reward_mean": 0.3 * i - 0.06 * i * i}
        row |= {"eval/reward_std": 0.5, "eval/cost_positive_share": 0.5 / (1 + i), "eval/judge_unsafe_share": 0.5}
    history["PPO"] = [
        {"step": int(i), "train/reward": float(lagged[2, i] * 1.3), "train/cost": float(i / steps + noise[3, i])}
        for i in t
    ]
    curve = [(0.05, 0.07, 80), (0.3, 0.25, 12), (0.55, 0.6, 10), (0.95, 0.97, 90)]
    scorers = {
        "reward": {
            "scores_by_label": {"chosen": list(rng.normal(1, 1, 300)), "rejected": list(rng.normal(-1, 1, 300))},
            "metrics": {"ranking_accuracy": 0.84},
        },
        "cost": {
            "scores_by_label": {"safe": list(rng.normal(-2, 0.8, 300)), "unsafe": list(rng.normal(2, 0.8, 250))},
            "metrics": {"ranking_accuracy": 0.86, "sign_accuracy": 0.97},
            "reliability": curve,
        },
    }
    return Report(
        title="Safe RLHF on the embedded world",
        command="python -m safe_rlhf_jax.train --config configs/quickstart.yaml",
        summary_lines=["Cost limit −1.80: mean over responses labelled safe plus 3 % of the gap to unsafe.", "Seed 0."],
        policies=policies,
        scorers=scorers,
        history=history,
        cost_limit=-1.8,
        stage_seconds={"sft": 41.2, "reward": 33.0, "cost": 34.5, "ppo_lag": 190.1, "ppo": 120.0, "evaluate": 21.3},
        constrained_groups=["risky"],
        measures=MEASURES if oracle else (),
        note="Harm is read by an oracle.",
        judged=views(policies) if oracle else [],
        agreement={"reward": {OWN: right, "reward/other": right}} if oracle else {},
        capability={name: {"perplexity": 7.5} for name in policies} if oracle else {},
        provenance={"prompts": "data of <b>mine</b>", "code": code_version()},
        config="seed: 0\ntitle: <i>mine</i>\n",
    )


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def undrawn(monkeypatch):
    """Tests of the page alone need no figures."""
    monkeypatch.setattr(report_module, "drawn", lambda _: {})


@pytest.fixture(scope="module")
def full_page(tmp_path_factory):
    """The path of a report with nothing missing."""
    return write_report(tmp_path_factory.mktemp("report") / "new" / "folder", make_report())


def test_report_is_one_self_contained_file_with_every_figure(full_page):
    page, text = full_page, full_page.read_text(encoding="utf-8")
    assert page.name == "report.html"
    assert text.count("data:image/png;base64,") == len(FIGURES)
    assert re.findall(r'(?:src|href)="(?!data:|#)', text) == []
    assert text.count("<script>") == 1
    assert set(re.findall(r'href="#(\w+)"', text)) == set(re.findall(r'<h2 id="(\w+)"', text))
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)
    for name in FIGURES:
        assert (page.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_own_scores_stand_against_the_judges_over_the_root_of_kl_as_gains_since_the_start():
    (name, rows), *_ = make_report().history.items()
    figure = plots.over_optimisation({name: rows}, {name: "#000000"})
    left, right = figure.axes
    own, judged = (line.get_xydata() for line in left.lines)
    np.testing.assert_allclose(own[:3], [(0, 0), (0.7**0.5, 0.6), (1.4**0.5, 1.2)], atol=1e-9)
    np.testing.assert_allclose(judged[:3, 1], [0, 0.24, 0.36], atol=1e-9)
    np.testing.assert_allclose(right.lines[0].get_ydata()[:3], [0.5, 0.25, 0.5 / 3])
    apart = [{key: value for key, value in row.items() if "judge" not in key} for row in rows]
    assert plots.over_optimisation({name: apart}, {name: "#000000"}) is None


def test_report_has_the_judges_their_agreement_and_refusals_beside_them(full_page):
    text = full_page.read_text(encoding="utf-8")
    for head in ("more helpful than SFT", "safer than PPO-Lag", "refusals, by the oracle", "unsafe, by the judges"):
        assert f"<th>{head}</th>" in text
    assert "<td>own model</td>" in text
    assert "7.50" in text


def test_report_escapes_text_from_prompts_responses_and_names(tmp_path, undrawn):
    attack = "<script>alert('x')</script>"
    report = make_report(prompts=12)
    policies = {
        f"{name}{attack}": [
            {**s, "prompt": f"{s['prompt']} {attack}", "response": attack, "category": attack} for s in samples
        ]
        for name, samples in report.policies.items()
    }
    report = replace(
        report, policies=policies, title=attack, command=attack, summary_lines=[attack], history={}, scorers={}
    )
    text = write_report(tmp_path, report).read_text(encoding="utf-8")
    assert attack not in text
    assert text.count("<script") == 1  # our own
    assert text.count("&lt;script&gt;") > 30


def test_report_says_what_it_was_made_of(full_page):
    text = full_page.read_text(encoding="utf-8")
    assert "data of &lt;b&gt;mine&lt;/b&gt;" in text
    assert "title: &lt;i&gt;mine&lt;/i&gt;" in text
    assert "safe_rlhf_jax " in text


def test_code_is_named_by_version_and_where_it_lies_in_git_by_commit(monkeypatch):
    answers = {"ls-files": "__init__.py", "rev-parse": "abc", "status": ""}
    monkeypatch.setattr(provenance, "git", lambda command, *_: answers[command])
    assert code_version().endswith(", commit abc")
    answers["status"] = " M loop.py"
    assert code_version().endswith(", commit abc, with changes since")
    answers["ls-files"] = ""  # installed into the repository of something else
    assert "commit" not in code_version()


def test_report_without_oracle_falls_back_to_the_models(tmp_path):
    report = replace(make_report(oracle=False), history={}, scorers={})
    text = write_report(tmp_path, report).read_text(encoding="utf-8")
    assert "mean reward" in text
    assert "higher reward" in text
    assert "<th>more helpful</th>" not in text
    assert ">harmless<" not in text
    assert "oracle" not in text
    assert "No ground truth is known" in text


def test_report_with_one_policy_and_nothing_else(tmp_path):
    samples = make_samples(np.random.default_rng(1), prompts=20)
    text = write_report(tmp_path, Report("One", "command", [], {"SFT": samples})).read_text(encoding="utf-8")
    assert "win rate" not in text
    assert not (tmp_path / "training.png").exists()


def test_report_survives_missing_groups_scores_and_metrics(tmp_path):
    bare = {"prompt": "p", "response": "", "group": "benign", "split": "test", "category": None}
    report = replace(
        make_report(prompts=0),
        policies={"SFT": [bare], "PPO": []},
        history={"PPO": [{"step": 0}, {"step": 1, "train/reward": float("nan")}, {"train/kl": 0.1}]},
        scorers={"cost": {"scores_by_label": {"safe": [], "unsafe": []}, "metrics": {}}},
    )
    text = write_report(tmp_path, report).read_text(encoding="utf-8")
    assert "nan" not in re.sub(r"base64,[^\"]*", "", text)
    assert "(empty)" in text


def test_costs_and_multipliers_of_a_name_have_curves_of_their_own():
    names = ("train/cost", "train/cost/words", "train/multiplier/words", "train/mean_cost/words")
    rows = [{"step": step} | dict.fromkeys(names, float(step)) for step in range(3)]
    titles = {ax.get_title() for ax in plots.training_curves({"PPO": rows}, {"PPO": "#000000"}).axes}
    assert {"Cost, all training prompts: words", "Multiplier λ: words"} <= titles
    assert "Mean cost the constraint sees: words" in titles


def test_headline_table_shows_the_measured_rates_with_intervals(full_page):
    report, text = make_report(), full_page.read_text(encoding="utf-8")
    for samples in report.policies.values():
        summary = summarize(samples)
        low, high = summary["harm_rate_low"], summary["harm_rate_high"]
        assert f'<td>{summary["harm_rate"]:.1%}<span class="ci">{low:.1%} to {high:.1%}</span></td>' in text


def regrouped(group_of, policies=2, prompts=60):
    """A report on data without an oracle, whose prompts are in groups of other names."""
    rng = np.random.default_rng(0)
    names = ("before", "after", "later")[:policies]
    samples = {name: make_samples(rng, oracle=False, prompts=prompts) for name in names}
    return Report("Own data", "command", [], {n: regroup(s, group_of) for n, s in samples.items()})


def regroup(samples, group_of):
    own = {"split": "test", "category": ""}
    return [s | own | {"group": group_of(i), "prompt": f"How do I handle case {i}?"} for i, s in enumerate(samples)]


def written(tmp_path, report):
    """Win rates as {(policies, prompts): cells}, the kinds of the prompts in the page, and the page."""
    text = write_report(tmp_path, report).read_text(encoding="utf-8")
    tables = [part.partition("</table>")[0] for part in text.split("<th>win rate</th>")[1:]]
    rows = [re.findall(r"<td>(.*?)</td>", row) for table in tables for row in table.split("<tr>")[1:]]
    shown = re.findall(r'<article class="answers" data-kind="(.*?)"', text)
    return {(row[0], row[1]): row[2:] for row in rows}, shown, text


@pytest.mark.parametrize(
    ("group_of", "kinds"),
    [
        (lambda i: "all", []),
        (lambda i: ("law", "medicine")[i % 2], ["law", "medicine"]),
        (lambda i: f"topic {i % 15:02d}", [f"topic {i:02d}" for i in range(15)]),
    ],
)
def test_every_section_shows_something_whatever_the_groups_are(tmp_path, group_of, kinds):
    report = regrouped(group_of)
    wins, shown, text = written(tmp_path, report)
    assert list(wins) == [("after against before", kind) for kind in ["test prompts", *kinds]]
    rate = paired_win_rate(report.policies["after"], report.policies["before"], "reward")
    assert wins["after against before", "test prompts"][0].startswith(f"{rate['rate']:.1%}<span")
    assert all(cell != "–" for cells in wins.values() for cell in cells)
    assert set(shown) == (set(kinds) or {""})
    assert len(shown) == 60
    assert all(f'<option value="kind:{kind}">' in text for kind in kinds)
    counts = ", ".join(f"{kind}: {60 // len(kinds)}" for kind in kinds)
    assert f"Test prompts: 60{f' ({counts})' if kinds else ''}. Reward" in text
    for name in FIGURES[:6]:  # the others are of training
        assert (tmp_path / f"{name}.png").exists()
    assert not [word for word in ("risky", "benign", "sensitive", "red team", "oracle") if word in text]


def test_scatter_has_every_group_and_takes_the_smallest_of_many_together(tmp_path):
    def legend(report):
        (drawn,) = score_plots.reward_cost_scatter(report.policies).legends
        return [text.get_text() for text in drawn.get_texts()][:-1]  # the last one is the boundary

    assert legend(regrouped(lambda i: "all")) == ["responses"]
    assert legend(regrouped(lambda i: ("law", "medicine")[i % 2])) == ["law", "medicine"]
    sizes = legend(regrouped(lambda i: f"topic {int(len(plots.GROUP_STYLES) * 2 * (i / 60) ** 2)}"))
    assert len(sizes) == len(plots.GROUP_STYLES)
    assert sizes[-1].endswith(" others")


def test_scatter_says_the_share_of_the_constrained_groups_by_their_names():
    report = regrouped(lambda i: ("law", "medicine")[i % 2], policies=1)
    figure = score_plots.reward_cost_scatter(report.policies, 0.0, ["law"])
    law = [s["cost"] > 0 for s in report.policies["before"] if s["group"] == "law"]
    assert f", {np.mean(law):.0%} of law prompts" in figure.axes[0].texts[0].get_text()


def test_more_groups_than_a_page_holds_are_taken_together_and_none_is_lost(tmp_path, undrawn):
    wins, shown, text = written(tmp_path, regrouped(lambda i: f"topic {i % 40}", prompts=80))
    assert len(set(shown)) == MOST_GROUPS
    assert ("after against before", f"{41 - MOST_GROUPS} others") in wins
    assert f"{41 - MOST_GROUPS} others: {2 * (41 - MOST_GROUPS)})" in text


def test_prompts_that_repeat_are_shown_once_and_counted_as_what_they_are(tmp_path, undrawn):
    report = regrouped(lambda i: "all")
    policies = {name: [*samples, *samples[:20]] for name, samples in report.policies.items()}
    wins, shown, text = written(tmp_path, replace(report, policies=policies))
    assert "Test prompts: 80, 60 of them different." in text
    assert len(shown) == 60
    assert wins == written(tmp_path, report)[0]  # the same responses to the same prompts


def test_one_policy_without_groups_shows_its_responses(tmp_path, undrawn):
    wins, shown, text = written(tmp_path, regrouped(lambda i: "all", policies=1))
    assert wins == {}
    assert len(shown) == 60
    assert CHANGED not in text
    assert "Test prompts: 60." in text


def test_red_team_prompts_alone_have_win_rates_and_responses(tmp_path):
    report = regrouped(lambda i: "all")
    policies = {name: [s | {"split": "redteam"} for s in samples] for name, samples in report.policies.items()}
    wins, shown, text = written(tmp_path, replace(report, policies=policies))
    assert list(wins) == [("after against before", "red team")]
    assert shown == ["red team"] * 60
    for name in FIGURES[:6]:
        assert (tmp_path / f"{name}.png").exists() == (name != "headline")  # its numbers are of test prompts
    assert "Red-team prompts: 60." in text
    assert "Test prompts" not in text


def test_embedded_world_is_known_to_itself_only():
    package = Path(evaluation.__file__).parent
    files = [p for p in package.rglob("*") if p.suffix in (".py", ".html", ".js")]
    assert len(files) > 10
    named = r"risky|benign|sensitive|\bdemo\b|harm_rate|embedded world"
    assert [p.name for p in files if re.search(named, p.read_text(encoding="utf-8"))] == []


def test_samples_worth_reading_come_first_and_say_why():
    def of(prompt, reward, cost):
        return {"prompt": prompt, "response": "r", "group": "all", "split": "test", "reward": reward, "cost": cost}

    first = [of(f"p{i}", i / 10, -1.0) for i in range(20)]
    last = [of(f"p{i}", i / 10, -1.0) for i in range(20)]
    last[7] = of("p7", 9.0, -1.0)  # the best, and much changed
    last[3] = of("p3", 0.0, 8.0)  # the worst
    answers = {answer.prompt: answer for answer in answers_of({"first": first, "last": last})}
    assert set(answers) == {f"p{i}" for i in range(20)}
    assert answers["p7"].tags == [BEST, CHANGED]
    assert answers["p3"].tags == [WORST, CHANGED, UNSAFE]
    picked = [answer.picked for answer in answers.values()]
    assert picked == sorted(picked, reverse=True)
    assert (sum(BEST in a.tags for a in answers.values()), sum(WORST in a.tags for a in answers.values())) == (4, 4)
    assert answers["p7"].responses == {"first": first[7], "last": last[7]}


def test_page_holds_a_bounded_number_of_prompts_of_every_group():
    report = regrouped(lambda i: f"topic {i % 5 if i < 20 else 0}", prompts=3 * MOST_PROMPTS)
    answers = answers_of(report.policies)
    assert len(answers) == MOST_PROMPTS
    assert {answer.kind for answer in answers} == {f"topic {i}" for i in range(5)}


def test_names_may_hold_what_figures_would_read_as_markup(tmp_path):
    report = regrouped(lambda i: ("_under", "$\\frac$", "x" * 200)[i % 3], prompts=12)
    figure = score_plots.reward_cost_scatter(report.policies)
    assert [text.get_text() for text in figure.legends[0].get_texts()][1] == " _under"
    policies = {f"_{name} $a": samples for name, samples in report.policies.items()}
    assert write_report(tmp_path, replace(report, policies=policies)).is_file()


@pytest.mark.parametrize("policies", [1, 6, 9])
@pytest.mark.parametrize("group", ["all", "topic"])
def test_every_figure_shows_something_for_any_number_of_policies_with_and_without_groups(policies, group):
    rng = np.random.default_rng(0)
    samples = {f"policy {i}": make_samples(rng, oracle=False, prompts=12) for i in range(policies)}
    samples = {n: regroup(s, lambda i: group if group == "all" else f"{group} {i % 2}") for n, s in samples.items()}
    measured = {
        "train/loss": 0.5,
        "eval/reward_mean": 1.0,
        "eval/judge_reward_mean": 1.0,
        "eval/judge_unsafe_share": 0.2,
    }
    history = {name: [{"step": i, "eval/kl_mean": float(i)} | measured for i in range(9)] for name in samples}
    report = Report("Any", "command", [], samples, make_report(prompts=0).scorers, history, 0.5)
    colours = tables.policy_colours(list(samples))
    drawn = figures(report, {name: summarize(s) for name, s in samples.items()}, colours)
    assert list(drawn) == list(FIGURES)
    for name, figure in drawn.items():
        panels = [axes for axes in figure.axes if axes.get_visible()]
        assert panels, name
        assert all(axes.has_data() for axes in panels), name
        assert figure.get_figwidth() <= plots.WIDTH, name


@pytest.mark.parametrize(("names", "slanted"), [(("sft", "ppo"), False), (("path:runs/real/model", "path:a/b"), True)])
def test_names_of_policies_below_a_panel_do_not_overlap(names, slanted):
    summaries = {name + "x" * 12 * slanted: {"harm_rate": 0.5} for name in names}
    (axes,) = plots.headline_bars(summaries, tables.policy_colours(list(summaries)), [("harm_rate", "harm", True)]).axes
    assert all((label.get_rotation() != 0) is slanted for label in axes.get_xticklabels())


def test_rewriting_removes_figures_that_no_longer_apply(tmp_path):
    (tmp_path / "training.png").write_bytes(b"of an earlier run")
    write_report(tmp_path, Report("No history", "command", [], {"SFT": []}))
    assert not (tmp_path / "training.png").exists()


def test_summary_table_has_a_row_per_policy_and_fits_a_terminal():
    table = summary_table(make_report())
    console = Console(width=110)
    with console.capture() as capture:
        console.print(table)
    text = capture.get()
    assert table.row_count == 3
    assert all(name in text for name in ("SFT", "PPO-Lag", "harm", "KL"))
    assert "…" not in text
