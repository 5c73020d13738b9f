"""Scorers of pairs: what they have in common, and what each learns on pictures of two colours that two groups like."""

from __future__ import annotations

import json
import threading
from functools import cache, partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from generator.comparison import Comparison, Picture
from generator.grm import INSTRUCTION, Grm, ScaledLinear
from generator.mllm import MllmInput
from generator.mllm_presets import build_mllm
from generator.settings import MllmSettings, TinyMllmSettings
from offline.cg4ctr import Cg4Ctr, train_cg4ctr
from offline.evaluation import ScorerOutputError, evaluate
from offline.grm_training import CAIG_POINT_WEIGHT, NoPairsError, fit_temperature, train_grm
from offline.judge import JudgeAnswerError, ZeroShotJudge
from offline.labelled_pair import Pair
from offline.seeing import Lesson, teach
from offline.settings import EndpointSettings, RewardSettings
from online.encoders import HashedImageEncoder, HashedTextEncoder

SMALL = MllmSettings(
    group_hidden_size=32,
    tiny=TinyMllmSettings(
        eyes="learnt", hidden_size=32, n_layers=2, n_heads=2, image_px=16, patch_px=8, vision_hidden_size=16
    ),
)
REWARD = RewardSettings(
    n_steps=120, n_lesson_steps=60, batch_pairs=16, batch_lessons=8, learning_rate=3e-3, lesson_learning_rate=5e-3
)


def png(colour):
    buffer = BytesIO()
    Image.new("RGB", (16, 16), colour).save(buffer, "PNG")
    return buffer.getvalue()


@cache
def pairs_of_taste(n_products, *, first_product=0):
    """Return pairs of a red and a blue picture: groups near one point like red, near the other blue."""
    rng = np.random.default_rng(first_product)
    likes = np.random.default_rng(99).normal(size=128)
    pairs = []
    for product in range(first_product, first_product + n_products):
        pictures = [
            Picture(f"{product}-{name}", partial(png, tuple(int(v) for v in np.array(base) + rng.integers(0, 40, 3))))
            for name, base in (("red", (200, 20, 20)), ("blue", (20, 20, 200)))
        ]
        for sign in (1, -1):
            feature = (sign * likes + 0.5 * rng.normal(size=(11, 128))).astype(np.float32)
            winner, loser = pictures[::sign]
            pairs.append(Pair(Comparison(f"p{product}", f"Chair {product}", feature, winner, loser), 0.95, 0.09, 0.03))
    return tuple(pairs)


@cache
def trained_grm(with_group):
    mllm = build_mllm(SMALL, seed=0)
    pairs = pairs_of_taste(16)
    winners = [pair.winner_first.first for pair in pairs]
    lessons = [Lesson(each, f"{'warm' if 'red' in each.key else 'cool'} palette") for each in winners]
    teach(mllm, lessons, REWARD, seed=0)
    torch.manual_seed(0)
    grm = Grm(mllm, with_group=with_group, name="grm" if with_group else "caig")
    train_grm(grm, pairs, REWARD, seed=0, point_weight=0.0 if with_group else CAIG_POINT_WEIGHT)
    return grm


@cache
def trained_cg4ctr():
    torch.manual_seed(0)
    model = Cg4Ctr(HashedTextEncoder(), HashedImageEncoder(), {})
    train_cg4ctr(model, pairs_of_taste(4), REWARD.model_copy(update={"n_steps": 3}), seed=0)
    return model


class Endpoint(BaseHTTPRequestHandler):
    """Finds the first picture better, with three chances in four."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        top = [{"token": "1", "logprob": float(np.log(0.6))}, {"token": " 2", "logprob": float(np.log(0.2))}]
        plain = asked["model"] != "with logprobs"
        choice = {
            "message": {"content": "neither" if asked["model"] == "odd" else "1"},
            "logprobs": None if plain else {"content": [{"top_logprobs": top}]},
        }
        assert [part["type"] for part in asked["messages"][0]["content"]] == ["text", "image_url", "image_url"]
        assert self.headers["Authorization"] == "Bearer secret"
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [choice]}).encode())

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def judge_url():
    with HTTPServer(("127.0.0.1", 0), Endpoint) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1/"
        server.shutdown()
        thread.join()


@pytest.fixture
def judge(judge_url):
    with httpx.Client() as client:
        yield lambda model: ZeroShotJudge(EndpointSettings(url=judge_url, model=model, api_key="secret"), client)


@pytest.fixture(params=["grm", "caig", "cg4ctr", "judge"])
def scorer(request, judge):
    if request.param == "cg4ctr":
        return trained_cg4ctr()
    if request.param == "judge":
        return judge("with logprobs")
    return trained_grm(request.param == "grm")


def test_every_scorer_answers_with_probabilities(scorer):
    comparisons = [pair.winner_first for pair in pairs_of_taste(3, first_product=50)]
    found = scorer.p_first_wins(comparisons)
    assert found.shape == (6,)
    assert ((found >= 0.0) & (found <= 1.0)).all()
    assert scorer.name
    assert np.array_equal(scorer.p_first_wins(comparisons), found)
    assert scorer.p_first_wins(comparisons[3:]) == pytest.approx(found[3:], abs=1e-6)
    assert scorer.p_first_wins([]).shape == (0,)


def test_every_scorer_can_be_evaluated(scorer):
    found = evaluate(scorer, pairs_of_taste(3, first_product=50))
    assert (found.n_pairs, found.n_products) == (6, 3)
    assert found.accuracy_low <= found.accuracy <= found.accuracy_high
    assert sum(part.n_pairs for part in found.reliability) == 6


def test_the_grm_learns_which_group_likes_what():
    found = evaluate(trained_grm(True), pairs_of_taste(10, first_product=100))
    assert found.accuracy >= 0.95
    assert found.order_inconsistency == 0.0


def test_both_orders_of_a_pair_say_the_same():
    grm = trained_grm(True)
    comparisons = [pair.winner_first for pair in pairs_of_taste(10, first_product=100)]
    turned = grm.logits([comparison.swapped() for comparison in comparisons])
    assert turned == pytest.approx(-grm.logits(comparisons), abs=1e-5)


def test_pairs_teach_nothing_but_heads():
    mllm = build_mllm(SMALL, seed=0)
    grm = Grm(mllm)
    before = {name: value.clone() for name, value in mllm.model.state_dict().items()}
    heads = {name: head.weight.clone() for name, head in grm.heads.items()}
    train_grm(grm, pairs_of_taste(2), REWARD.model_copy(update={"n_steps": 2}), seed=0)
    assert all(torch.equal(value, before[name]) for name, value in mllm.model.state_dict().items())
    changed = {name for name, head in grm.heads.items() if not torch.equal(head.weight, heads[name])}
    assert changed == {"look", "ask", "fc_cls"}


def test_what_enters_the_language_model_is_read_without_asking_it():
    mllm = build_mllm(SMALL, seed=0)
    pictures = [Picture(name, partial(png, colour)) for name, colour in (("a", (9, 99, 199)), ("b", (250, 0, 0)))]
    rows = [MllmInput(INSTRUCTION, (picture.open(),)) for picture in pictures]
    inputs = mllm.encode(rows)
    with torch.no_grad():
        states = mllm.model.model(**inputs, output_hidden_states=True).hidden_states
    shown = inputs["input_ids"] == mllm.processor.image_token_id
    readings = {layer: {} for layer in (0, -1)}
    n_asked = []
    mllm.model.model.language_model.register_forward_hook(lambda *_: n_asked.append(1))
    for layer, found in readings.items():
        Grm(mllm, with_group=False, layer=layer, readings=found).logits(
            [Comparison("p", "Chair", np.zeros((11, 128), np.float32), *pictures)]
        )
        assert len(n_asked) == (0 if layer == 0 else 1)
        for row, picture in enumerate(pictures):
            expected = states[layer][row][shown[row]].mean(dim=0)
            torch.testing.assert_close(found[picture.key], expected, rtol=1e-5, atol=1e-6)


def test_a_head_learns_alike_at_every_scale_of_what_it_reads():
    states = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for gain, shift in ((1.0, 0.0), (0.01, 0.1)):
        torch.manual_seed(1)
        head = ScaledLinear(8, 3)
        head.fit_scale(gain * states + shift)
        found.append(head(gain * states + shift))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[0].mean(dim=0), head.bias, rtol=0, atol=1e-5)


def test_rounding_stays_small():
    alike = 5.0 + 1e-7 * torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    head = ScaledLinear(8, 3)
    head.fit_scale(alike)
    torch.testing.assert_close(head(alike), head.bias.expand(50, 3), rtol=0, atol=1e-5)


def test_a_pair_teaches_by_how_much_it_was_won():
    grm = trained_grm(True)
    pairs = pairs_of_taste(16)
    assert [pair.share for pair in pairs] == pytest.approx([0.75] * len(pairs))
    # What was learnt is the share and no chance of winning: 0.95 is the temperature's.
    logits = grm.logits([pair.winner_first for pair in pairs])
    assert float(np.median(logits)) == pytest.approx(np.log(3.0), abs=0.4)
    chances = grm.p_first_wins([pair.winner_first for pair in pairs])
    assert float(np.median(chances)) == pytest.approx(0.95, abs=0.03)


def test_without_the_group_nobody_can_tell():
    found = evaluate(trained_grm(False), pairs_of_taste(10, first_product=100))
    assert found.accuracy == 0.5


def test_without_the_group_its_feature_changes_nothing():
    pair = pairs_of_taste(1, first_product=100)[0].winner_first
    other = Comparison(pair.product_id, pair.title, pair.group_feature * -1, pair.first, pair.second)
    grm, no_group = trained_grm(True), trained_grm(False)
    assert no_group.p_first_wins([pair]) == no_group.p_first_wins([other])
    assert abs(grm.p_first_wins([pair]) - grm.p_first_wins([other])) > 0.3


def test_saved_and_loaded_it_judges_alike(tmp_path):
    grm = trained_grm(True)
    grm.save(tmp_path)
    loaded = Grm.load(tmp_path)
    comparisons = [pair.winner_first for pair in pairs_of_taste(3, first_product=50)]
    assert loaded.p_first_wins(comparisons) == pytest.approx(grm.p_first_wins(comparisons), abs=1e-6)
    assert (loaded.name, loaded.with_group, loaded.temperature) == (grm.name, True, grm.temperature)


@pytest.mark.parametrize(("share", "stages"), [(0.5, ["calibration", "pairs"]), (0.0, ["pairs"])])
def test_a_model_learns_from_all_products_after_its_temperature_is_fitted(share, stages):
    grm = Grm(build_mllm(SMALL, seed=0))
    settings = REWARD.model_copy(update={"n_steps": 2, "calibration_share": share})
    read, told = [], []
    losses = grm.judge

    def judge(comparisons):
        if torch.is_grad_enabled():
            read.append({row.product_id for row in comparisons})
        return losses(comparisons)

    grm.judge = judge
    train_grm(grm, pairs_of_taste(4), settings, seed=0, on_step=lambda stage, step, loss: told.append((stage, step)))
    assert told == [(stage, step) for stage in stages for step in range(2)]
    assert set.union(*read[-2:]) == {"p0", "p1", "p2", "p3"}
    assert len(set.union(*read[:2])) == (2 if share else 4)


def test_without_pairs_nothing_is_trained():
    with pytest.raises(NoPairsError):
        train_grm(Grm(build_mllm(SMALL, seed=0)), [], REWARD, seed=0)


@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
def test_the_temperature_is_found_again(temperature):
    logits = np.random.default_rng(0).normal(0, 3, 2_000)
    assert fit_temperature(logits, 1 / (1 + np.exp(-logits / temperature))) == pytest.approx(temperature, rel=1e-3)


@pytest.mark.parametrize(("model", "chance"), [("with logprobs", 0.75), ("plain", 1.0)])
def test_the_judge_says_how_sure_it_is_where_it_can(judge, model, chance):
    comparisons = [pair.winner_first for pair in pairs_of_taste(1)]
    assert judge(model).p_first_wins(comparisons) == pytest.approx(chance)


def test_a_judge_that_does_not_judge_is_refused(judge):
    with pytest.raises(JudgeAnswerError, match="'neither'"):
        judge("odd").p_first_wins([pairs_of_taste(1)[0].winner_first])


class Always:
    """A scorer with one answer."""

    name = "always"

    def __init__(self, answer):
        self.answer = answer

    def p_first_wins(self, comparisons):
        return np.full(len(comparisons), self.answer)


@pytest.mark.parametrize(("answer", "accuracy", "inconsistency"), [(0.5, 0.5, 1.0), (0.9, None, 1.0)])
def test_who_always_says_the_same_is_right_half_of_the_time(answer, accuracy, inconsistency):
    found = evaluate(Always(answer), pairs_of_taste(100))
    assert found.accuracy == pytest.approx(0.5 if accuracy is None else accuracy, abs=0.1)
    assert found.order_inconsistency == inconsistency


@pytest.mark.parametrize("answer", [1.5, -0.1, np.nan])
def test_no_probability_is_refused(answer):
    with pytest.raises(ScorerOutputError):
        evaluate(Always(answer), pairs_of_taste(2))


def test_the_interval_is_over_products():
    class KnowsOne:
        name = "knows one"

        def p_first_wins(self, comparisons):
            winners = {"0-red", "1-red"}
            p = np.array([0.9 if row.first.key in winners else 0.1 for row in comparisons])
            return np.where([row.product_id == "p0" for row in comparisons], p, 1 - p)

    # One group's pairs of two products, all right of the one and all wrong of the other, a hundred times over.
    found = evaluate(KnowsOne(), pairs_of_taste(2)[::2] * 100)
    assert (found.accuracy, found.accuracy_low, found.accuracy_high) == (0.5, 0.0, 1.0)
