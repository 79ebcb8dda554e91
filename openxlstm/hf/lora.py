"""Where adapters go: module names for `peft.LoraConfig(target_modules=...)`, by architecture (`config.architecture`).

All linear maps but those of the two gates, which decide what is remembered for how long; "all-linear" adapts them too.
q, k, v and the gates of the NeurIPS architecture are headwise: three axes, no nn.Linear, and PEFT refuses them by name.
"""

LORA_TARGETS = {
    "xlstm": ["up", "down", "ffn_up", "ffn_down"],
    "xlstm_large": ["q", "k", "v", "ogate_preact", "out_proj", "proj_up", "proj_up_gate", "proj_down"],
}
