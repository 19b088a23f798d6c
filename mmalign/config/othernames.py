"""Settings by the names that other tools give them, so that a refusal can say what they are called here."""

from __future__ import annotations

OTHER_NAMES = {
    "adam_beta1": "optim.betas", "adam_beta2": "optim.betas", "adam_epsilon": "optim.eps",
    "adam_weight_decay": "optim.weight_decay", "attn_implementation": "model.attention", "beta_dpo": "method.beta",
    "center_crop": "data.crop", "checkpointing_steps": "run.save_every",
    "checkpoints_total_limit": "run.keep_checkpoints", "clip_grad_norm": "optim.max_grad_norm",
    "data_dir": "data.manifest", "dataloader_num_workers": "data.workers", "dataset": "data.manifest",
    "dataset_name": "data.manifest", "enable_xformers_memory_efficient_attention": "model.attention",
    "epochs": "optim.steps", "grad_accum": "optim.accumulate", "gradient_accumulation_steps": "optim.accumulate",
    "guidance_scale": "evaluate.guidance", "learning_rate": "optim.lr", "logging_steps": "run.log_every",
    "lora_alpha": "tuning.alpha", "lora_dropout": "tuning.dropout", "lora_r": "tuning.rank",
    "lora_rank": "tuning.rank", "lora_target_modules": "tuning.targets", "loss_type": "method.objective",
    "lr_scheduler": "optim.schedule", "lr_scheduler_type": "optim.schedule", "lr_warmup_steps": "optim.warmup_steps",
    "max_seq_length": "data.max_length", "max_steps": "optim.steps", "max_train_steps": "optim.steps",
    "mixed_precision": "model.dtype", "model_name_or_path": "model.path", "num_epochs": "optim.steps",
    "num_inference_steps": "evaluate.steps", "num_train_epochs": "optim.steps",
    "num_warmup_steps": "optim.warmup_steps", "num_workers": "data.workers", "optimizer": "optim.name",
    "output_dir": "run.out", "per_device_train_batch_size": "optim.batch_size", "precision": "model.dtype",
    "pretrained_model_name_or_path": "model.path", "proportion_empty_prompts": "data.drop_caption",
    "random_flip": "data.flip", "ref_model": "reference.name", "report_to": "run.trackers",
    "resume_from_checkpoint": "--resume", "save_steps": "run.save_every", "save_total_limit": "run.keep_checkpoints",
    "torch_dtype": "model.dtype", "train_batch_size": "optim.batch_size", "train_data_dir": "data.manifest",
    "use_lora": "tuning.name", "use_peft": "tuning.name", "validation_prompts": "evaluate.prompts",
    "warmup": "optim.warmup_steps", "warmup_ratio": "optim.warmup_steps",
}  # fmt: skip
"""Name in the launch scripts of TRL, diffusers and the published methods -> dotted key here. A dash counts as an underscore."""
