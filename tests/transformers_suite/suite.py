"""transformers' own model tests on our classes, both block types. Run by :mod:`run`, not alone.

``tests`` here is transformers' test package, put first on the path by the runner. Its mixins look
model classes up by name, so the names are entered before anything is imported from it.
"""

import sys
import tempfile
import types
import unittest

from transformers.models.auto import modeling_auto

from rodimus import (
    RodimusConfig,
    RodimusForCausalLM,
    RodimusForSequenceClassification,
    RodimusModel,
)

for _mapping, _class in {
    "MODEL_MAPPING_NAMES": RodimusModel,
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": RodimusForCausalLM,
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": RodimusForSequenceClassification,
}.items():
    getattr(modeling_auto, _mapping)["rodimus"] = _class.__name__

# these need checkpoints of the hub or several accelerators, and import half of transformers' tests
for _module, _mixin in {
    "test_pipeline_mixin": "PipelineTesterMixin",
    "test_fsdp_mixin": "FSDPTesterMixin",
    "test_tensor_parallel_mixin": "TensorParallelTesterMixin",
}.items():
    _empty = sys.modules[f"tests.{_module}"] = types.ModuleType(f"tests.{_module}")
    setattr(_empty, _mixin, type(_mixin, (), {}))

from tests.causal_lm_tester import CausalLMModelTest, CausalLMModelTester  # noqa: E402
from transformers.cache_utils import DynamicCache, StaticCache  # noqa: E402

WINDOW = 64
KEYS = 16


class RodimusTester(CausalLMModelTester):
    """A tiny Rodimus in the shapes that the mixins expect of a text model."""

    base_model_class = RodimusModel
    config_class = RodimusConfig
    causal_lm_class = RodimusForCausalLM
    sequence_classification_class = RodimusForSequenceClassification
    block_type = "rodimus"

    def get_config(self):
        return RodimusConfig(
            block_type=self.block_type,
            d_model=self.hidden_size,
            n_layer=self.num_hidden_layers,
            vocab_size=self.vocab_size,
            mixer_cfg={"mem_size": KEYS},
            attn_cfg={
                "num_heads": self.num_attention_heads,
                "num_heads_k": 1,
                "num_heads_v": self.num_attention_heads,
                "window_size": 2 * (WINDOW - 1),
            },
            max_position_embeddings=self.max_position_embeddings,
            pad_token_id=self.pad_token_id,
            bos_token_id=self.bos_token_id,
            eos_token_id=self.eos_token_id,
        )


class RodimusPlusTester(RodimusTester):
    block_type = "rodimus_plus"


class _Suite(CausalLMModelTest):
    def _check_past_key_values_for_generate(self, batch_size, past_key_values, seq_length, config):
        """Our cache: taps and state of every layer; keys of one head and the values folded beside
        them, or in a static cache a ring of both."""
        cache = past_key_values
        self.assertIsInstance(cache, DynamicCache | StaticCache)
        self.assertEqual(len(cache.layers), config.n_layer)
        for layer in cache.layers:
            taps, state = layer.conv_states[0], layer.recurrent_states[0]
            self.assertEqual(taps.shape[:2], (batch_size, config.d_inner))
            self.assertEqual(state.shape, (batch_size, 1, config.mem_size, config.d_inner))
            if config.block_type == "rodimus_plus":
                if isinstance(cache, StaticCache):
                    row = config.head_dim + config.d_model
                    self.assertEqual(layer.ring.shape[::2], (batch_size, row))
                    self.assertGreaterEqual(layer.ring.shape[1], min(seq_length, WINDOW))
                    continue
                held = min(seq_length, WINDOW - 1)
                self.assertEqual(layer.keys.shape, (batch_size, 1, held, config.head_dim))
                self.assertEqual(layer.values.shape, (batch_size, 1, held, config.d_model))

    def _check_attentions_for_generate(
        self, batch_size, attentions, prompt_length, output_length, config, decoder_past_key_values
    ):
        """A sliding layer names no longest length, and the mixin then expects a dynamic cache's:
        the weights are those of the keys that there are, however long the ring."""
        cache = decoder_past_key_values
        if not isinstance(cache, StaticCache):
            return super()._check_attentions_for_generate(
                batch_size, attentions, prompt_length, output_length, config, cache
            )
        self.assertEqual(len(attentions), output_length - prompt_length)
        for step, layers in enumerate(attentions):
            queries = 1 if step else prompt_length
            keys = min(prompt_length + step, WINDOW)
            for weights in layers:
                expected = (batch_size, config.num_attention_heads, queries, keys)
                self.assertEqual(weights.shape, expected)

    def test_sdpa_can_dispatch_non_composite_models(self):
        """Where nothing is asked for, transformers' model uses "sdpa" and ours its operator."""
        for model_class in self.all_model_classes:
            config, _ = self.model_tester.prepare_config_and_inputs_for_common()
            with tempfile.TemporaryDirectory() as folder:
                model_class(config).save_pretrained(folder)
                for asked, used in ((None, "rodimus_ska"), ("sdpa", "sdpa"), ("eager", "eager")):
                    model = model_class.from_pretrained(folder, attn_implementation=asked)
                    self.assertEqual(model.config._attn_implementation, used)


class RodimusTest(_Suite, unittest.TestCase):
    model_tester_class = RodimusTester
    has_attentions = False


class RodimusPlusTest(_Suite, unittest.TestCase):
    model_tester_class = RodimusPlusTester


del CausalLMModelTest, _Suite
