"""Names that depend on the model type, as data; checked against the live model before use."""

from torch import nn

# Config lists with one entry per layer. A whitelist: "any list of that length" would also match `eos_token_id`.
PER_LAYER_LISTS = (
    "layer_types",
    "mlp_layer_types",
    "attention_layers",
    "layer_rope_theta",
    "no_rope_layers",
    "num_attention_heads_per_layer",
    "layers_block_type",
    "block_types",
    "intermediate_size",
    "activation_sparsity_pattern",
)


# Config dict of the values that single layers have of their own, by index.
OVERRIDES = "per_layer_config"


# Config count of the last layers, which attend to the keys and values of the last layer of their type before them.
SHARING_SUFFIX = "num_kv_shared_layers"


# Attributes in which such layers say so.
SHARING = "is_kv_shared_layer"


# Attributes in which layers store what else such a config makes of their place.
PLACE_ATTRIBUTES = ("store_full_length_kv", "kv_shared_layer_index")


# Config keys that give each layer an input of its own, computed from the tokens outside of the layers. So a model has
# inputs for as many layers as it was made with, and a layer has its own in its place only.
PLACE_BOUND = ("hidden_size_per_layer_input",)


# Config lists of a whole model with an entry for each of the first layers behind which features of images are added.
FEATURES_OF_FIRST_LAYERS = ("deepstack_visual_indexes",)


# Config lists of the layers before which such features are added: their indices, or pairs that end with them.
FEATURE_LAYERS = ("spatial_target_layers", "deepstack_layer_map")


# Layer types without a KV cache, by whose length models count the tokens that a cache has seen.
UNCOUNTED_TYPES = {"linear_attention", "mamba", "conv", "moe", "mlp"}


# Model types that ask their first layer for that count, whatever its type.
COUNTED_BY_FIRST_LAYER = {"minimax"}


# Config lists that hold the indices of the layers that have a property.
LAYER_INDEX_LISTS = (
    *("mlp_only_layers", "moe_layers", "attn_layer_indices", "full_attn_idxs", "hybrid_layer_ids"),
    "rope_scaling_layers",
)


# Dicts in configs, and the lists in them that number the layers of a kind from 1.
NUMBERED_FROM_ONE = {"linear_attn_config": ("full_attn_layers", "kda_layers")}


# Config counts of the first layers, which are dense where the others have experts.
DENSE_PREFIXES = ("first_k_dense_replace", "num_dense_layers")


# Config pairs: a layer is special if the remainder of its index by the first is the second.
PERIODS_WITH_OFFSET = (("attn_layer_period", "attn_layer_offset"), ("expert_layer_period", "expert_layer_offset"))


# Config rules that say which layers are special; a splice rewrites or overrules them.
PERIODS = (
    "attention_types",
    "decoder_sparse_step",
    "max_window_layers",
    "_sliding_window_pattern",
    "no_rope_layer_interval",
)


# Config keys that layers do not compute with.
LAYERLESS = {
    *("vocab_size", "tie_word_embeddings", "use_cache", "initializer_range", "max_position_embeddings", "n_positions"),
    *("output_hidden_states", "output_attentions", "return_dict", "pretraining_tp", "problem_type", "torch_dtype"),
    *("embedding_multiplier", "logits_scaling", "logit_scale", "final_logit_softcapping", "word_embed_proj_dim"),
}


# Attributes in which a layer, or a module in it, stores its index.
INDEX_ATTRIBUTES = ("layer_idx", "layer_id", "layer_number")


# Attributes in which a layer, or a module in it, stores the number of layers.
COUNT_ATTRIBUTES = ("num_hidden_layers",)


# Modules (end of the path) and parameters (without `weight`/`bias`) by which a layer writes to the residual stream.
OUTPUT_PROJECTIONS = {
    "attention": ("o_proj", "out_proj", "c_proj", "dense", "wo", "Wo", "dense_attention", "output"),
    "mixer": ("out_proj", "o_proj", "linear_out", "down_proj"),
    "mlp": (
        *("down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h", "w2", "down_proj_bias", "output_linear", "Wo"),
        "output.dense",  # of an encoder; its `intermediate.dense` goes the other way
        "feed_forward.value",
    ),
}


# The branch of a module, by what its name in the layer contains; the others are MLPs.
BRANCHES = {"attention": ("att",), "mixer": ("mixer", "mamba", "conv", "temporal")}


# Other names that files have for the base model.
STORED_NAMES = ("backbone",)


# What stands before the layers of a text model in checkpoints of models with more in them, of any release.
TEXT_PREFIXES = ("language_model.model", "model.language_model", "language_model", "model.text_model", "text_model")


# Config values that scale the embeddings before the first layer: an organ alone must run without them.
NEUTRAL_EMBEDDING = {"embedding_multiplier": 1.0}


# Config values that make layers depend on each other or on their place; no organ can be cut where they are set.
UNCUTTABLE = {
    "kv_source_layers": "shares keys and values between layers that it numbers; they cannot be cut apart",
    "num_mem_blocks": "uses the same weights in several layers; they cannot be cut apart",
    "rescale_every": "changes the weights of its layers in place, by where they stand",
}


# Config keys that say nothing about what a model computes.
NAMES = {"_name_or_path", "architectures", "transformers_version", "dtype", "id2label", "label2id"} | {
    "quantization_config"  # how files hold weights; an organ that joins does so in its own dtype
}


# Attributes that every module has, or that the user or the loader sets: they do not come from the config.
NOT_DERIVED = vars(nn.Module()).keys() | {
    *(*INDEX_ATTRIBUTES, *PLACE_ATTRIBUTES),  # set on every splice
    "gradient_checkpointing",
    "name_or_path",
    "vocab_size",
    "padding_idx",
}
