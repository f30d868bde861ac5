"""Keys of other trainers' recipes, for hints."""

from __future__ import annotations

__all__ = ["FOREIGN_KEYS", "LESS_BITS"]

FOREIGN_KEYS = {
    **dict.fromkeys(("lr", "learning_rate"), "training.learning_rate"),
    **dict.fromkeys(("num_train_epochs", "num_epochs", "epochs"), "training.epochs"),
    **dict.fromkeys(
        (
            "per_device_train_batch_size",
            "train_batch_size",
            "batch_size",
            "micro_batch_size",
            "gradient_accumulation_steps",
        ),
        "training.pairs_per_step",
    ),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler", "scheduler"), "training.schedule"),
    **dict.fromkeys(("warmup_ratio", "warmup_steps"), "training.warmup"),
    **dict.fromkeys(("max_grad_norm", "gradient_clipping"), "training.clip"),
    **dict.fromkeys(("save_steps", "save_interval"), "training.save_every"),
    **dict.fromkeys(("eval_steps", "eval_interval"), "training.evaluate_every"),
    **dict.fromkeys(("lora", "peft", "peft_config", "lora_config"), "adapter"),
    **dict.fromkeys(("r", "lora_r", "lora_rank"), "adapter.rank"),
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    **dict.fromkeys(("target_modules", "lora_target", "lora_target_modules", "lora_target_linear"), "adapter.targets"),
    **dict.fromkeys(("use_rslora", "use_dora", "peft_use_rslora", "peft_use_dora"), "adapter.kind"),
    **dict.fromkeys(("loraplus_lr_ratio", "lora_plus_ratio"), "adapter.learning_rate_ratio"),
    **dict.fromkeys(("lora_modules_to_save", "additional_target"), "adapter.modules_to_save"),
    **dict.fromkeys(("target_parameters", "lora_target_parameters"), "adapter.targets"),
    **dict.fromkeys(("model_name_or_path", "base_model", "model_name", "model_id"), "model.path"),
    **dict.fromkeys(("torch_dtype", "bf16", "fp16"), "model.dtype"),
    **dict.fromkeys(("attn_implementation", "flash_attn", "flash_attention"), "model.attention"),
    **dict.fromkeys(("adapter_name_or_path", "lora_model_dir"), "model.adapter"),
    **dict.fromkeys(("dataset", "datasets", "dataset_name", "train_file", "data_path"), "data.train.source"),
    **dict.fromkeys(
        ("max_seq_length", "max_seq_len", "sequence_len", "cutoff_len", "max_prompt_length"), "data.max_length"
    ),
    **dict.fromkeys(("val_size", "val_set_size", "test_size"), "data.held_out.fraction"),
    **dict.fromkeys(("loss_type", "pref_loss", "rl"), "objective.kind"),
    **dict.fromkeys(("pref_beta", "dpo_beta"), "objective.beta"),
    **dict.fromkeys(("output_dir", "save_dir"), "run.folder"),
    **dict.fromkeys(("report_to", "logging"), "run.tracker"),
    "ref_model": "reference.model",
    "precompute_ref_log_probs": "reference.mode",
}
"""Keys of TRL, Axolotl, LLaMA-Factory and Unsloth, and the corresponding keys here."""
LESS_BITS = ("load_in_4bit", "load_in_8bit", "quantization_bit", "quantization")
"""Keys that ask for a quantised base."""
