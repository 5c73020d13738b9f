from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from generator.group_llava import GROUP_TOKEN
from generator.instructions import INSTRUCTIONS, Task, TitleMissing
from generator.mllm import GroupMllm, InstructionHoldsPlaceholder, MllmInput
from generator.mllm_presets import PresetUnavailable, build_mllm, fit_tokenizer
from generator.prompt import VOCABULARY, Prompt
from generator.settings import MllmSettings, TinyMllmSettings

SMALL = MllmSettings(
    group_hidden_size=32,
    tiny=TinyMllmSettings(
        eyes="learnt",
        hidden_size=48,
        n_layers=2,
        n_heads=2,
        vision_hidden_size=16,
        n_vision_layers=1,
        image_px=32,
        patch_px=16,
    ),
)
ROOT = Path(__file__).parents[2]
RED = Image.new("RGB", (40, 30), "red")
GROUPS = np.random.default_rng(0).normal(size=(2, 11, 128)).astype(np.float32)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def mllm() -> GroupMllm:
    return build_mllm(SMALL, seed=0)


def prompt(scene: str) -> str:
    return Prompt("a chair", scene, "warm", "golden hour", "no props", "centred").text


def test_the_tokenizer_is_the_same_each_time_and_spells_anything() -> None:
    first, second = fit_tokenizer(["Ståhl's chair"], vocab_size=600), fit_tokenizer(["Ståhl's chair"], vocab_size=600)
    assert first.get_vocab() == second.get_vocab()
    text = "Ωmega – 椅子, “quoted” <angle>\n\ttab"
    assert first.decode(first(text)["input_ids"]) == text


def test_a_prompt_of_ours_is_short_in_tokens() -> None:
    tokenizer = fit_tokenizer(vocab_size=1_024)
    for scene in VOCABULARY["scene"]:
        assert len(tokenizer(prompt(scene))["input_ids"]) <= 32


def test_the_group_stands_first_and_pictures_before_the_text(mllm: GroupMllm) -> None:
    text = mllm.prompt_text("Describe it.", n_images=2, group=True)
    assert text.startswith(GROUP_TOKEN)
    assert text.index("<image><image>") < text.index("Describe it.")
    assert GROUP_TOKEN not in mllm.prompt_text("Describe it.", n_images=2)


def test_a_batch_holds_rows_of_every_kind(mllm: GroupMllm) -> None:
    rows = [
        MllmInput("Two pictures and a group.", (RED, RED), GROUPS[0]),
        MllmInput("Text alone."),
        MllmInput("A group.", (), GROUPS[1]),
    ]
    batch = mllm.encode(rows, ["yes", "no, not at all", "maybe"])
    ids, labels = batch["input_ids"], batch["labels"]
    assert (ids == mllm.model.config.group_token_id).sum(1).tolist() == [1, 0, 1]
    assert (ids == mllm.processor.image_token_id).sum(1).tolist() == [8, 0, 0]
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    np.testing.assert_array_equal(batch["group_features"].numpy(), GROUPS)
    assert batch["attention_mask"][:, -1].tolist() == [1, 1, 1]
    spoken = [mllm.tokenizer.decode(of_row[of_row >= 0]) for of_row in labels]
    assert spoken == ["yes<|im_end|>", "no, not at all<|im_end|>", "maybe<|im_end|>"]
    assert torch.isfinite(mllm.model(**batch).loss)


@pytest.mark.parametrize("text", ["Look at <group> here", "A <image> of it"])
def test_a_placeholder_in_the_words_is_refused(mllm: GroupMllm, text: str) -> None:
    with pytest.raises(InstructionHoldsPlaceholder):
        mllm.encode([MllmInput(text)])
    with pytest.raises(InstructionHoldsPlaceholder):
        mllm.encode([MllmInput("Fine.")], [text])


def test_samples_depend_on_the_seed_and_leave_the_process_alone(mllm: GroupMllm) -> None:
    rows = [MllmInput("A group.", (RED,), GROUPS[0]), MllmInput("A longer text alone.")]
    options = {"max_new_tokens": 8, "n_samples": 2, "temperature": 1.0}
    state = torch.get_rng_state()
    first = mllm.generate(rows, **options, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == mllm.generate(rows, **options, seed=1)
    assert first != mllm.generate(rows, **options, seed=2)
    assert [len(of_row) for of_row in first] == [2, 2]


def test_the_likeliest_answer_does_not_depend_on_the_batch(mllm: GroupMllm) -> None:
    rows = [MllmInput("A group.", (RED,), GROUPS[0]), MllmInput("A longer text alone."), MllmInput("Hm", (), GROUPS[1])]
    together = mllm.generate(rows, max_new_tokens=6)
    assert together == mllm.generate(rows, max_new_tokens=6, batch_size=1)


def test_log_probs_are_those_of_the_answer_alone_whatever_the_batch(mllm: GroupMllm) -> None:
    rows = [MllmInput("A group.", (RED,), GROUPS[0]), MllmInput("A longer text alone."), MllmInput("Hm", (), GROUPS[1])]
    answers = ["yes", "no, not at all", "maybe"]
    together = mllm.log_probs(rows, answers)
    np.testing.assert_allclose(together, mllm.log_probs(rows, answers, batch_size=1), rtol=1e-4)
    for row, answer, log_prob in zip(rows, answers, together, strict=True):
        batch = mllm.encode([row], [answer])
        n_tokens = int((batch["labels"] >= 0).sum())
        with torch.no_grad():
            assert log_prob == pytest.approx(-float(mllm.model.eval()(**batch).loss) * n_tokens, rel=1e-4)


def test_placeholders_are_never_written(mllm: GroupMllm) -> None:
    table = mllm.model.get_input_embeddings().weight
    kept = table.detach().clone()
    with torch.no_grad():
        # The head is tied to the embeddings: this makes the placeholder by far the likeliest token.
        table[mllm.model.config.group_token_id] = 50 * table[5]
        mllm.generate([MllmInput("A group.", (), GROUPS[0])], max_new_tokens=4)
        table.copy_(kept)


def test_save_and_load_give_the_same_answers(mllm: GroupMllm, tmp_path: Path) -> None:
    rows = [MllmInput("A group.", (RED,), GROUPS[0]), MllmInput("Text alone.")]
    mllm.save(tmp_path)
    loaded = GroupMllm.load(tmp_path)
    assert loaded.generate(rows, max_new_tokens=8) == mllm.generate(rows, max_new_tokens=8)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.model.eval()(**loaded.encode(rows)).logits, mllm.model.eval()(**mllm.encode(rows)).logits
        )


def test_what_is_built_depends_on_the_seed_alone() -> None:
    first, again, other = (build_mllm(SMALL, seed=seed).model.state_dict() for seed in (1, 1, 2))
    name = "model.group_projector.linear_1.weight"
    torch.testing.assert_close(first[name], again[name], rtol=0, atol=0)
    assert not torch.equal(first[name], other[name])


def test_after_training_two_groups_get_their_own_prompts() -> None:
    mllm = build_mllm(SMALL, seed=0)
    instruction = "Write a prompt."
    rows = [MllmInput(instruction, (RED,), group) for group in GROUPS]
    answers = [prompt("photo studio"), prompt("desert dunes")]
    batch = mllm.encode(rows, answers)
    optimiser = torch.optim.AdamW(mllm.model.parameters(), lr=5e-3)
    mllm.model.train()
    for _ in range(60):
        loss = mllm.model(**batch).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert [texts[0] for texts in mllm.generate(rows, max_new_tokens=40)] == answers
    without = mllm.generate([MllmInput(instruction, (RED,))] * 2, max_new_tokens=40)
    assert without[0] == without[1]


def test_a_llava_of_anybodys_needs_a_checkpoint() -> None:
    with pytest.raises(PresetUnavailable, match=r"generator\.mllm\.checkpoint"):
        build_mllm(MllmSettings(preset="llava"), seed=0)


def save_a_llava(folder: Path, mllm: GroupMllm) -> None:
    """Write a small checkpoint as LLaVA-1.5's is: a first token, no padding token, and a vocabulary without <group>."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "</s>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator([], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", additional_special_tokens=["<image>"]
    )
    config = mllm.model.config.to_dict()
    native = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config={**config["text_config"], "vocab_size": len(tokenizer), "pad_token_id": None},
            vision_config=config["vision_config"],
            image_token_index=2,
            vision_feature_layer=-1,
        )
    )
    native.save_pretrained(folder)
    LlavaProcessor(
        mllm.processor.image_processor,
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="USER: {% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}<image>\n"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %} ASSISTANT:",
    ).save_pretrained(folder)


def test_the_llava_preset_adds_the_group_token_to_a_checkpoint(mllm: GroupMllm, tmp_path: Path) -> None:
    save_a_llava(tmp_path / "native", mllm)
    settings = MllmSettings(preset="llava", checkpoint=str(tmp_path / "native"), group_hidden_size=32)
    llava = build_mllm(settings, seed=0)
    assert llava.prompt_text("Hm", n_images=1, group=True) == "<s><group>USER: <image>\nHm ASSISTANT:"
    assert llava.prompt_text("Hm") == "<s>USER: Hm ASSISTANT:"
    row = MllmInput("Hm", (RED,), GROUPS[0])
    ids = llava.encode([row])["input_ids"][0].tolist()
    assert ids[:2] == [0, llava.model.config.group_token_id]
    assert ids.count(0) == 1
    # There was no row of the embeddings to spare for it.
    assert llava.model.config.group_token_id == len(llava.tokenizer) - 1
    assert llava.model.get_input_embeddings().weight.shape[0] == len(llava.tokenizer)
    llava.save(tmp_path / "ours")
    loaded = GroupMllm.load(tmp_path / "ours")
    assert loaded.generate([row], max_new_tokens=3) == llava.generate([row], max_new_tokens=3)


@pytest.mark.parametrize("task", list(Task))
def test_the_pool_has_four_wordings_of_each_task_with_table_5s_slots(task: Task) -> None:
    slots = {
        Task.GROUP_ANALYSIS: (True, False, False),
        Task.BEHAVIOURAL_PREDICTION: (True, True, False),
        Task.PRODUCT_COMPREHENSION: (False, False, True),
        Task.PROMPT_GENERATION: (True, True, True),
    }[task]
    assert len(set(INSTRUCTIONS[task])) == 4
    for template in INSTRUCTIONS[task]:
        assert (template.has_users, template.has_title, template.has_image) == slots
        filled = template.fill(title="A <group> chair")
        assert "<" not in filled
        assert "{" not in filled
        assert ("this group" in filled) == slots[0]
        assert "this group" not in template.fill(title="x", group=False)
        if slots[1]:
            with pytest.raises(TitleMissing):
                template.fill()


def test_a_process_that_only_loads_a_model_has_its_eyes_and_they_are_frozen(tmp_path: Path) -> None:
    tiny = TinyMllmSettings(eyes="statistics", hidden_size=16, n_layers=1, n_heads=1)
    build_mllm(MllmSettings(group_hidden_size=16, tiny=tiny), seed=0).save(tmp_path)
    script = (
        "import sys; from pathlib import Path; from generator.mllm import GroupMllm; "
        "tower = GroupMllm.load(Path(sys.argv[1])).model.model.vision_tower; "
        "assert not any(weights.requires_grad for weights in tower.parameters())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr
