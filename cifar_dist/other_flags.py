"""What timm's train.py, Hugging Face's Trainer and common scripts call our settings, and what we have no flag for."""

from __future__ import annotations

from collections.abc import Sequence

from cifar_dist.errors import did_you_mean, plain

OTHERS_NAMES = {
    "learning_rate": "lr", "base_lr": "lr", "lr_base": "lr", "wd": "weight_decay", "optimizer": "opt",
    "lr_scheduler_type": "sched", "lr_scheduler": "sched", "scheduler": "sched", "eta_min": "min_lr",
    "max_grad_norm": "clip_grad", "gradient_clip_val": "clip_grad", "num_epochs": "epochs",
    "num_train_epochs": "epochs", "max_epochs": "epochs", "max_train_steps": "max_steps",
    "early_stopping_patience": "patience",
    "bs": "batch_size", "batch": "batch_size", "train_batch_size": "batch_size",
    "gradient_accumulation_steps": "micro_batch_size",
    "grad_accum_steps": "micro_batch_size", "accumulate_grad_batches": "micro_batch_size",
    "arch": "model", "model_name": "model", "model_name_or_path": "model", "initial_checkpoint": "init_weights",
    "finetune": "init_weights", "input_size": "img_size", "image_size": "img_size", "drop_rate": "drop",
    "drop_path_rate": "drop_path", "model_ema": "model_ema_decay", "ema_decay": "model_ema_decay",
    "data_path": "dataset", "data_dir": "dataset", "train_dir": "dataset", "dataset_name": "dataset",
    "auto_augment": "aa", "randaugment": "aa", "label_smoothing": "smoothing", "label_smoothing_factor": "smoothing",
    "random_erasing": "reprob", "amp": "precision", "mixed_precision": "precision", "bf16": "precision",
    "fp16": "precision", "torchcompile": "compile", "torch_compile": "compile", "output_dir": "run_dir",
    "output": "run_dir", "experiment": "run_dir", "resume_from_checkpoint": "resume", "checkpoint_hist": "keep_last",
    "save_total_limit": "keep_last", "save_steps": "checkpoint_every", "recovery_interval": "checkpoint_every",
    "log_interval": "log_every", "logging_steps": "log_every", "report_to": "wandb",
    "project_name": "wandb_project", "wandb_project_name": "wandb_project", "amp_dtype": "precision",
    "run_name": "run_dir", "name": "run_dir", "logging_dir": "run_dir", "ckpt_path": "init_weights",
    "checkpoint_path": "init_weights", "weights": "init_weights", "load": "init_weights",
    "start_epoch": "resume", "freeze_backbone": "freeze", "freeze_encoder": "freeze", "linear_probe": "freeze",
    "num_train_steps": "max_steps", "iterations": "max_steps",
    "resize": "data_size", "image_column_name": "image_column", "label_column_name": "label_column",
    "optim": "opt",
}  # fmt: skip
_CROPS = " Random crops are --crop-padding's, or --scale's, whose ratios go from 3/4 to 4/3."
_PROCESSES = " How many processes there are is the launcher's to say: torchrun --standalone --nproc-per-node N …"
_MEMORY = " A smaller --micro-batch-size takes less memory."
_LOSS = " The loss is cross-entropy."
_TEST = " Test is a folder, or a split, of its own: docs/data.md shows how to set one apart."
_WEIGHTS = " Every image counts the same; the report has balanced accuracy and macro F1."
_PARTS = " train.py trains and watches val; evaluate.py scores test."
_OPTIMIZER = " The optimizer's other numbers are timm's."
_EPOCHS = " val is scored, and a checkpoint saved, after every epoch; the best one is kept and reported."
_LAUNCHER = " Engines are the launcher's to choose: accelerate launch --config_file accelerate_configs/…"
_TRACKERS = " Numbers go to W&B and to log.jsonl, which pandas reads."
_TRAIN = " All of train is used; --val-fraction 0.9 leaves a tenth of it, and --max-steps ends a trial early."
_HUB = " evaluate.py RUN_DIR --export DIR --push-to-hub NAME/REPO does that."
_WARMUP = " Did you mean --warmup-epochs, which is in epochs?"
_PER_DEVICE = " Did you mean --batch-size, which is over all processes?"
_EXACT = " Runs repeat themselves to the last bit as they are."
NO_SETTINGS = {
    "device": " Devices are the launcher's to choose: accelerate_configs/, or CUDA_VISIBLE_DEVICES.",
    "gpus": _PROCESSES, "num_gpus": _PROCESSES, "devices": _PROCESSES, "num_processes": _PROCESSES,
    "nproc_per_node": _PROCESSES, "local_rank": " Ranks come from the environment, as torchrun sets it.",
    "workers": " There are no loader workers to be set.", "num_workers": " There are no loader workers to be set.",
    "dataloader_num_workers": " There are no loader workers to be set.",
    "b": " Did you mean --batch-size, which is over all processes?",
    "num_classes": " The number of classes comes from the data.",
    "bce_loss": _LOSS, "jsd_loss": _LOSS, "aug_repeats": " Every image is seen once an epoch.",
    "ratio": _CROPS, "train_crop_mode": _CROPS,
    "vflip": " Images are mirrored left to right alone: --hflip.",
    "no_aug": " --crop-padding 0 --hflip 0 trains without augmentation.",
    "grad_checkpointing": _MEMORY, "gradient_checkpointing": _MEMORY,
    "do_train": _PARTS, "do_eval": _PARTS, "do_predict": _PARTS,
    "validation_dir": " val is the set's own split, or --val-fraction of train.",
    "max_train_samples": _TRAIN, "subset": _TRAIN, "train_fraction": _TRAIN, "limit_train_batches": _TRAIN,
    "train_size": _TRAIN, "eval_strategy": _EPOCHS, "evaluation_strategy": _EPOCHS, "eval_steps": _EPOCHS,
    "save_strategy": _EPOCHS, "val_interval": _EPOCHS, "load_best_model_at_end": _EPOCHS, "eval_metric": _EPOCHS,
    "metric_for_best_model": _EPOCHS, "deepspeed": _LAUNCHER, "fsdp": _LAUNCHER, "zero_stage": _LAUNCHER,
    "strategy": _LAUNCHER, "tensorboard": _TRACKERS, "logger": _TRACKERS, "log_wandb": _TRACKERS,
    "deterministic": _EXACT, "j": " There are no loader workers to be set.", "loss": _LOSS, "criterion": _LOSS,
    "model_kwargs": " Of a model's own arguments there are --img-size, --drop and --drop-path.",
    "crop_pct": " Evaluation sees whole images.",
    "bn_momentum": " BatchNorm is timm's.", "bn_eps": " BatchNorm is timm's.",
    "decoupled_decay": " AdamW's weight decay is so, Adam's and SGD's is not: --opt.",
    "warmup_steps": _WARMUP, "warmup_ratio": _WARMUP, "per_device_train_batch_size": _PER_DEVICE,
    "data_seed": " --split-seed draws val, --seed all else.",
    "dry_run": " --plan prints what would run.", "evaluate": _PARTS, "eval_only": _PARTS, "test_only": _PARTS,
    "k_fold": " Splits are drawn by --split-seed; there are no folds.",
    "kfold": " Splits are drawn by --split-seed; there are no folds.",
    "ignore_mismatched_sizes": " A head of another size is replaced without being asked.",
    "trust_remote_code": " Models are timm's.", "tokenizer_name": " Models are timm's.",
    "overwrite_output_dir": " A run's folder is never overwritten: name another --run-dir, or go on by --resume auto.",
    "push_to_hub": _HUB, "hub_model_id": _HUB,
    "betas": _OPTIMIZER, "opt_betas": _OPTIMIZER, "opt_eps": _OPTIMIZER, "adam_beta1": _OPTIMIZER,
    "adam_beta2": _OPTIMIZER, "adam_epsilon": _OPTIMIZER,
    "test_fraction": _TEST, "test_size": _TEST, "test_split": _TEST,
    "class_weights": _WEIGHTS, "class_weight": _WEIGHTS, "weighted_sampler": _WEIGHTS, "balanced_sampling": _WEIGHTS,
    "nesterov": " --opt sgd has Nesterov's momentum, --opt momentum the plain one.",
}  # fmt: skip


def suggestion(name: str, known: Sequence[str]) -> str:
    """`` Did you mean a, b?`` for a flag or key that is not among the `known`, by what other programs call ours, or by
    its letters; a word about what is no setting of ours."""
    words = {plain(word): word for word in known}
    ours = words.get(OTHERS_NAMES.get(plain(name), ""))
    no_setting = NO_SETTINGS.get(plain(name)) if "dataset" in words else None  # else it is not train.py that is asked
    return f" Did you mean {ours}?" if ours else no_setting or did_you_mean(name, list(known))


def suggestions(names: Sequence[str], known: Sequence[str]) -> str:
    """`suggestion` for a single name, or for each of several after its name."""
    if len(names) == 1:
        return suggestion(names[0], known)
    return "".join(f" {name}:{suggestion(name, known) or ' no such setting.'}" for name in names)
