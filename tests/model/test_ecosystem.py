"""What libraries around transformers rely on: Linears called, Trainer, LoRA, pipelines."""

import copy

import pytest
import torch
from torch import nn

from rodimus.generation import Engine, Request
from tests.model.helpers import ONE_KIND, random_ids


def test_every_linear_layer_is_called(model):
    """LoRA, quantisation and offloading replace modules: reading ``.weight`` would bypass them."""
    called = set()
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, module in linears.items():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    ids = random_ids(2, 12)
    for training in (True, False):
        called.clear()
        model.train(training)(ids, use_cache=False)
        assert called == set(linears), f"training={training}"
    cache = model(ids, use_cache=True).past_key_values
    called.clear()
    model(ids[:, :1], past_key_values=cache, use_cache=True)
    assert called == set(linears), "one token with a cache"


def test_adapters_on_every_linear_layer_change_the_output(model):
    """A low-rank addition by hand, without peft: the whole model moves, and its gradients flow."""
    adapters = nn.ModuleList()
    for module in [m for m in model.modules() if isinstance(m, nn.Linear)]:
        down = nn.Linear(module.in_features, 2, bias=False)
        up = nn.Linear(2, module.out_features, bias=False)
        adapters.append(nn.Sequential(down, up))
        module.register_forward_hook(lambda m, args, out, add=adapters[-1]: out + add(args[0]))
    model.requires_grad_(False)
    ids = random_ids(2, 12)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in adapters.parameters())


def test_lora_of_peft(model):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    ids = random_ids(2, 12)
    with torch.no_grad():
        before = model(ids).logits
    lora = peft.get_peft_model(
        copy.deepcopy(model),
        peft.LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    lora(input_ids=ids, labels=ids).loss.backward()
    adapters = {n: p for n, p in lora.named_parameters() if "lora_" in n}
    linears = sum(isinstance(m, nn.Linear) for m in model.modules()) - 1
    assert len(adapters) == 2 * linears
    assert all(p.grad is not None and p.grad.any() for p in adapters.values())
    with torch.no_grad():
        adapted = lora.eval()(input_ids=ids).logits
        merged = lora.merge_and_unload()(ids).logits
    assert not torch.allclose(adapted, before, atol=1e-2)
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-3)


def test_prompt_tuning_of_peft_generates(model):
    """Each step is that of one forward over the virtual tokens and all others."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    sizes = {"num_attention_heads": 1, "num_layers": 1, "token_dim": model.config.d_model}
    tuned = peft.get_peft_model(
        model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, **sizes)
    ).eval()
    ids = random_ids(2, 12)
    found = tuned.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    with torch.no_grad():
        logits = tuned(input_ids=found[:, :-1]).logits[:, -8:]
    assert torch.equal(found[:, -8:], logits.argmax(-1))


@ONE_KIND
def test_trainer_accumulates_to_the_same_loss(model, tmp_path):
    """4 steps of 2 rows are one step of 8: the loss is divided by the tokens of all of them."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from transformers import Trainer, TrainingArguments

    ids = random_ids(8, 20)
    rows = [
        {"input_ids": row, "labels": row.masked_fill(torch.arange(20) < 2 * i, -100)}
        for i, row in enumerate(ids)
    ]
    losses = []
    for batch, accumulation in ((8, 1), (2, 4)):
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            logging_steps=1,
            learning_rate=1e-3,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(model=copy.deepcopy(model), args=arguments, train_dataset=rows)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=2e-4)


def test_the_trainer_predicts_logits(model, tmp_path):
    """Metrics are computed from them alone, though the output holds the cross entropy as well."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from transformers import Trainer, TrainingArguments

    ids = random_ids(2, 12)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(model=model, args=TrainingArguments(tmp_path, use_cpu=True, report_to=[]))
    predictions = trainer.predict(rows).predictions
    with torch.no_grad():
        assert (predictions == model(ids).logits.numpy()).all()


@pytest.mark.parametrize("adapted", [False, True])
def test_label_smoothing_smooths_the_next_token(model, tmp_path, adapted):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from transformers import Trainer, TrainingArguments

    ids = random_ids(2, 12)
    labels = ids.clone()
    labels[0, :5] = -100
    if adapted:
        peft = pytest.importorskip("peft", reason="peft is not installed")
        model = peft.get_peft_model(
            model, peft.LoraConfig(target_modules=["fc"], r=4, task_type="CAUSAL_LM")
        )
    arguments = TrainingArguments(tmp_path, label_smoothing_factor=0.1, use_cpu=True, report_to=[])
    trainer = Trainer(model=model, args=arguments)
    with torch.no_grad():
        found = trainer.compute_loss(model, {"input_ids": ids, "labels": labels})
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    exact = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), label_smoothing=0.1)
    torch.testing.assert_close(found, exact)


def test_pipeline_gives_each_prompt_its_own_text(model):
    """A batch of prompts of different lengths equals the prompts one by one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, pipeline

    words = {"<pad>": 0, **{f"w{i}": i for i in range(1, 97)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", padding_side="left"
    )
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    prompts = ["w5 w6 w7 w8 w9 w10 w11", "w3", "w20 w21 w22"]
    options = {"max_new_tokens": 12, "do_sample": False}
    batch = generator(prompts, batch_size=3, **options)
    alone = [generator(prompt, **options) for prompt in prompts]
    assert batch == alone


def test_no_claim_of_continuous_batching(model):
    """Servers ask ``hasattr``; a recurrent state has no pages to share."""
    assert not hasattr(model, "init_continuous_batching")
    for start in (
        lambda: model.generate_batch([[5, 6]], max_new_tokens=2),
        lambda: model.generate(torch.tensor([[5, 6]]), cache_implementation="paged"),
    ):
        with pytest.raises(NotImplementedError, match="no pages.*rodimus.generation.Engine"):
            start()


def test_linear_layers_are_of_a_class_that_quantisers_replace(model):
    """Some look for ``nn.Linear`` itself."""
    others = {
        name.rsplit(".", 1)[-1]
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and type(layer) is not nn.Linear
    }
    assert others == {"mem_gate_proj"}


def by_torch(model):
    quantization = pytest.importorskip("torch.ao.quantization")
    return quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)


def by_torchao(model):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantise", [by_torch, by_torchao])
def test_eight_bit_layers(model, quantise):
    ids = random_ids(1, 12)
    with torch.no_grad():
        exact = model(ids).logits
        quantised = quantise(copy.deepcopy(model))
        rounded = quantised(ids).logits
    # measured with these random models: 0.02 to 0.10, activations being rounded to 7 bits by torch
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.2
    expected = quantised.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
    (found,) = Engine(quantised).generate([Request(ids[0], 20, stop_tokens=())])
    assert found.tokens[: expected.shape[1] - 12] == expected[0, 12:].tolist()


def test_blocks_are_named_for_sharding(model):
    """accelerate keeps a block on one device by this name."""
    names = set(model._no_split_modules)
    assert names == {type(layer).__name__ for layer in model.model.layers}


def test_blocks_on_disk(model, tmp_path):
    """accelerate brings each module's own parameters for its forward alone."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    model.save_pretrained(tmp_path)
    blocks = {f"model.layers.{i}": "disk" if i else "cpu" for i in range(model.config.n_layer)}
    others = {f"model.{name}": "cpu" for name, _ in model.model.named_children()}
    places = {**others, **blocks, "lm_head": "cpu"}
    del places["model.layers"]
    offloaded = type(model).from_pretrained(
        tmp_path, device_map=places, offload_folder=tmp_path / "offload"
    )
    assert any(p.is_meta for p in offloaded.parameters())
    ids = random_ids(2, 12)
    with torch.no_grad():
        assert torch.equal(offloaded(ids).logits, model(ids).logits)
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(offloaded.generate(ids, **options), model.generate(ids, **options))


def test_tensors_without_values_have_shapes(model):
    """Tools that estimate memory and FLOPs run a model on the meta device."""
    model.to("meta")
    ids, places = torch.zeros(2, 9, dtype=torch.long, device="meta"), torch.arange(9, device="meta")
    outputs = model(ids, labels=ids, use_cache=True)
    assert outputs.logits.shape == (2, 9, model.config.vocab_size)
    assert model(ids, position_ids=places.expand(2, -1)).logits.shape == outputs.logits.shape
    step = model(ids[:, :1], past_key_values=outputs.past_key_values)
    assert step.logits.shape == (2, 1, model.config.vocab_size)


def test_deep_copy_and_pickle(model, tmp_path):
    ids = random_ids(1, 9)
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        with torch.no_grad():
            assert torch.equal(other(ids).logits, model(ids).logits)


def test_resized_embeddings(model):
    model.resize_token_embeddings(104)
    ids = random_ids(1, 9, vocab=104)
    with torch.no_grad():
        assert model(ids).logits.shape == (1, 9, 104)
    assert model.config.vocab_size == 104
