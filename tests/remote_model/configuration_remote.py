"""The configuration of a small model that brings its code."""

from transformers import PretrainedConfig


class RemoteConfig(PretrainedConfig):
    model_type = "remote_fla"

    def __init__(
        self,
        vocab_size=64,
        hidden_size=48,
        num_heads=2,
        num_value_heads=4,
        head_dim=16,
        conv_size=4,
        layers=("kimi", "ling", "gdn", "lightning"),
        lower_bound=-5.0,
        rms_norm_eps=1e-5,
        **kwargs,
    ):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_heads, self.num_value_heads, self.head_dim = num_heads, num_value_heads, head_dim
        self.conv_size, self.layers = conv_size, list(layers)
        self.num_hidden_layers = len(self.layers)
        self.lower_bound, self.rms_norm_eps = lower_bound, rms_norm_eps
        super().__init__(**kwargs)
