"""What a name of another tool's configuration is called here, or what to do where there is nothing of the kind.

Names are those of axolotl, LLaMA-Factory, TRL and transformers, torchtune, ms-swift, unsloth and PEFT.
"""

from __future__ import annotations

from ftune.methods import METHODS

__all__ = ["ELSEWHERE", "GENERIC", "HERE", "NOTES", "NO_FIELD"]


def _all(names: str, meaning: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), meaning)


ELSEWHERE = {
    # the model
    **_all("model_name_or_path model_name base_model pretrained_model_name_or_path model_path model_id", "model.id"),
    **_all("torch_dtype bf16 fp16 precision mixed_precision", "model.dtype"),
    **_all("attn_implementation attn_impl flash_attention flash_attn flash_attention_2", "model.attention"),
    **_all("model_revision", "model.revision"),
    # the method
    **_all("lora_r r lora_rank galore_rank", "method.rank"),
    "lora_alpha": "method.alpha",
    **_all("lora_dropout vera_dropout", "method.dropout"),
    **_all("lora_target lora_target_modules lora_target_linear galore_target", "method.target_modules"),
    "use_rslora": "method.rslora",
    **_all("init_lora_weights prompt_tuning_init", "method.init"),
    "loraplus_lr_ratio": "method.lora_plus_ratio",
    "target_r": "method.target_rank",
    "init_r": "method.init_rank",
    "tinit": "method.init_warmup",
    "tfinal": "method.final_warmup",
    "deltaT": "method.allocate_every",
    "orth_reg_weight": "method.orthogonal_weight",
    "galore_scale": "method.scale",
    "galore_layerwise": "method.per_layer",
    **_all("galore_update_interval update_proj_gap", "method.update_every"),
    "trainable_params": "method.train_embeddings",
    "rope_scaling": "method.rope",
    "projection_prng_key": "method.projection_seed",
    "random_loc_seed": "method.location_seed",
    "num_virtual_tokens": "method.virtual_tokens",
    "prompt_tuning_init_text": "method.init_text",
    "prefix_projection": "method.projection",
    **_all("adapter finetuning_type train_type tuner_type peft_type use_dora use_galore", "method.name"),
    **_all("load_in_4bit quantization_bit quant_bits", "method.quantization"),
    "bnb_4bit_quant_type": "method.quantization.type",
    "bnb_4bit_use_double_quant": "method.quantization.double",
    "bnb_4bit_compute_dtype": "method.quantization.compute_dtype",
    # the data
    **_all("dataset datasets train_file train_data train_dataset data_path data_files dataset_name", "data.train"),
    **_all("validation validation_file val_dataset eval_dataset eval_file eval_data validation_data", "data.eval"),
    **_all("test_datasets test_file", "data.eval"),
    **_all("val_set_size val_size test_size split_dataset_ratio", "data.eval_fraction"),
    **_all("max_seq_length max_seq_len sequence_len cutoff_len", "data.max_length"),
    **_all("truncation truncation_strategy", "data.too_long"),
    **_all("sample_packing eval_sample_packing eval_packing", "data.packing"),
    **_all("train_on_inputs assistant_only_loss completion_only_loss roles_to_train train_on_prompt", "data.train_on"),
    **_all("template chat_template_jinja chat_template_path", "data.chat_template"),
    **_all("max_samples max_train_samples num_samples", "data.train.max_examples"),
    "max_eval_samples": "data.eval.max_examples",
    "columns": "data.train.columns",
    "format": "data.train.format",
    "split_on": "data.train.split_on",
    "path": "data.train.path",
    "dataset_text_field": "data.train.columns.text",
    **_all("text_column text_field", "data.train.columns.text"),
    **_all("prompt_column input_column", "data.train.columns.prompt"),
    **_all("response_column output_column label_column target_column", "data.train.columns.completion"),
    "field_messages": "data.train.columns.messages",
    **_all("system system_prompt default_system", "data.train.columns.system"),
    # the optimizer and its schedule
    "lr": "optimizer.learning_rate",
    **_all("optim optimizer_type", "optimizer.name"),
    "adam_epsilon": "optimizer.eps",
    **_all("adam_beta1 adam_beta2 beta1 beta2 adam_betas", "optimizer.betas"),
    **_all("lr_scheduler lr_scheduler_type scheduler scheduler_type", "schedule.name"),
    **_all("warmup num_warmup_steps lr_warmup_steps", "schedule.warmup_steps"),
    **_all("lr_warmup_ratio warmup_fraction", "schedule.warmup_ratio"),
    **_all("cosine_min_lr_ratio min_lr min_lr_rate", "schedule.min_lr_ratio"),
    # the run
    **_all("per_device_train_batch_size batch_size train_batch_size", "training.micro_batch_size"),
    **_all("gradient_accumulation grad_accum accumulation_steps", "training.gradient_accumulation_steps"),
    **_all("num_train_epochs num_epochs n_epochs max_epochs", "training.epochs"),
    **_all("steps num_steps max_steps_per_epoch", "training.max_steps"),
    **_all("max_norm gradient_clipping gradient_clip_val clip_grad_norm grad_clip", "training.max_grad_norm"),
    **_all("random_seed random_state data_seed", "training.seed"),
    **_all(
        "enable_activation_checkpointing activation_checkpointing use_gradient_checkpointing",
        "training.gradient_checkpointing",
    ),
    **_all("save_steps save_every_steps save_strategy saves_per_epoch", "checkpoint.every_steps"),
    "save_total_limit": "checkpoint.keep",
    **_all("eval_steps eval_strategy evaluation_strategy evals_per_epoch", "evaluation.every_steps"),
    **_all("per_device_eval_batch_size eval_batch_size", "evaluation.batch_size"),
    **_all("logging report_to loggers", "tracking"),
    **_all("out_dir save_dir output output_path", "output_dir"),
}
"""Names that other tools use, and the field that means the same here."""

HERE = {
    ("method", "type"): "name",
    ("method", "bits"): "quantization",
    ("method", "quantize"): "quantization",
    ("method", "target"): "target_modules",
    ("optimizer", "type"): "name",
    ("optimizer", "epsilon"): "eps",
    ("schedule", "type"): "name",
    ("schedule", "warmup_epochs"): "warmup_ratio",
    ("model", "name"): "id",
    ("model", "path"): "id",
    **{("data", name): f"data.train.{name}" for name in ("split", "subset", "max_examples")},
    ("data", "file"): "data.train.path",
    ("data.train", "data_files"): "path",
    ("data.eval", "data_files"): "path",
    ("data", "test"): "eval",
    ("data", "val"): "eval",
    ("data", "valid"): "eval",
    ("data.train", "file"): "path",
    ("data.eval", "file"): "path",
    ("data.train", "type"): "format",
    ("data.eval", "type"): "format",
    ("data.train", "name"): "subset",
    ("data.eval", "name"): "subset",
    ("data.train", "limit"): "max_examples",
    ("data.eval", "limit"): "max_examples",
    ("data.train", "max_samples"): "max_examples",
    ("data.eval", "max_samples"): "max_examples",
    ("data.train", "mapping"): "columns",
    ("data.eval", "mapping"): "columns",
    ("evaluation", "steps"): "every_steps",
    ("evaluation", "every"): "every_steps",
    ("evaluation", "metric"): "metrics",
    ("evaluation", "max_tokens"): "max_new_tokens",
    ("evaluation", "max_samples"): "max_examples",
    ("evaluation", "limit"): "max_examples",
    ("checkpoint", "steps"): "every_steps",
    ("checkpoint", "every"): "every_steps",
    ("checkpoint", "keep_last"): "keep",
    ("checkpoint", "limit"): "keep",
}
"""Names that mean something else in one block than elsewhere: a field of that block, or another by its path."""

GENERIC = frozenset({"type", "name", "kind", "value", "id", "file", "mode", "size"})
"""Names that are near to others by chance."""

_SHARE = "a share of all updates, not a number of them"
_FILE = "a Jinja file; without it the model's own template"
NOTES = {
    **_all("tinit tfinal warmup_epochs", _SHARE),
    **_all("template prompt_template", _FILE),
    "save_strategy": "a number of updates",
    "eval_strategy": "a number of updates",
    "evaluation_strategy": "a number of updates",
    "saves_per_epoch": "a number of updates",
    "evals_per_epoch": "a number of updates",
    "use_dora": "`dora` for DoRA",
    "use_galore": "`galore` for GaLore",
    "lora_target_linear": "`all-linear`, the default",
    "train_on_inputs": "`all` or `assistant`",
    "max_steps_per_epoch": "a number of updates in the whole run",
    **_all("load_in_4bit quantization_bit quant_bits bits", "a block: {type: nf4}"),
}
"""What to say of a name whose value means something else here, or is written in another way."""

_READ = "remove it: it is read from the model's own files"
_TRACKER = "remove it, and add the tracker to `tracking`; it reads its other settings from the environment"
_PROCESSES = "remove it: `ftune train --num-processes N --engine fsdp2` (or deepspeed-zero3) shares the work"
_SUPERVISED = "remove it: ftune trains on texts and answers, not on preferences or rewards"
_GREEDY = "remove it: answers are generated greedily, so that they are the same each time"
_UPLOADS = "remove it: ftune uploads nothing"
_WORKERS = "remove it: how many processes read and tokenize is chosen by the size of the data"
_BEST = "remove it: no run is stopped early; see `checkpoint.every_steps` and `evaluation.every_steps`"
_TURNS = "remove it: `role` and `content`, `from` and `value` are all known"
_PADDING = "remove it: there is as little padding as can be"
_LOGGED = "remove it: every update is logged, in metrics.jsonl of the output_dir"
_COMPILED = "remove it: ftune does not compile models"
_ADAPTER = "remove it: it is not a setting here"
NO_FIELD = {
    **_all("do_train", "remove it: `ftune train` trains"),
    **_all("do_eval do_predict", "remove it: `ftune eval` measures and answers the held-out rows"),
    **_all("model_type tokenizer_type processor_type base_model_config model_author architecture arch", _READ),
    **_all("tokenizer tokenizer_name tokenizer_path special_tokens eos_token pad_token bos_token", _READ),
    "streaming": "remove it: rows are read into memory; `max_examples` of the source takes the first N",
    **_all("stage rl pref_loss dpo_beta kto_tag beta rlhf_type loss_type reward_model", _SUPERVISED),
    "overwrite_output_dir": "remove it: `ftune train --overwrite` replaces a run",
    **_all("resume_from_checkpoint auto_resume_from_checkpoints resume", "remove it: `ftune train --resume` goes on"),
    **_all("hub_model_id push_to_hub hub_strategy hub_private_repo", _UPLOADS),
    **_all("hub_token hf_token token use_auth_token hf_use_auth_token", "remove it: the token is read from HF_TOKEN"),
    **_all("cache_dir hf_home", "remove it: where the hub's files are kept is read from HF_HOME"),
    **_all("wandb_project wandb_entity wandb_run_id wandb_name wandb_watch wandb_log_model run_name", _TRACKER),
    **_all("mlflow_tracking_uri mlflow_experiment_name comet_project_name", _TRACKER),
    **_all("logging_steps logging_strategy logging_first_step log_every_n_steps log_interval plot_loss", _LOGGED),
    **_all("logging_dir log_dir metric_logger", _LOGGED),
    **_all("deepspeed fsdp fsdp_config fsdp_version ddp ddp_timeout ddp_backend tensor_parallel_size", _PROCESSES),
    **_all("local_rank world_size num_gpus n_gpu strategy", _PROCESSES),
    **_all("device device_map use_cpu no_cuda cuda", "remove it: CUDA_VISIBLE_DEVICES chooses the devices"),
    **_all("group_by_length pad_to_sequence_len pad_to_max_length padding length_column_name", _PADDING),
    **_all("dataloader_num_workers preprocessing_num_workers num_proc dataset_num_proc num_workers workers", _WORKERS),
    **_all("dataset_processes dataloader_pin_memory dataloader_prefetch_factor", _WORKERS),
    **_all("dataset_prepared_path overwrite_cache", "remove it: tokens are kept by the content of the data"),
    **_all("shuffle shuffle_seed", "remove it: rows are shuffled in every epoch, by `training.seed`"),
    **_all("early_stopping early_stopping_patience load_best_model_at_end metric_for_best_model save_best", _BEST),
    **_all("neftune_noise_alpha label_smoothing_factor label_smoothing", "remove it: it is not supported"),
    "load_in_8bit": "`method.quantization` keeps the base model in 4 bits; without it, it is kept in `model.dtype`",
    **_all("use_unsloth tf32 use_liger_kernel use_cache", "remove it: what is faster is chosen by itself"),
    **_all("compile torch_compile torch_compile_backend torch_compile_mode", _COMPILED),
    **_all("bias lora_bias fan_in_fan_out lora_fan_in_fan_out task_type inference_mode lora_on_cpu", _ADAPTER),
    **_all("modules_to_save lora_modules_to_save", "remove it: no whole modules are trained beside an adapter"),
    "remove_unused_columns": "remove it: `data.train.columns` says which columns are used",
    "formatting_func": "write a text with columns in it: `data.train.columns`",
    "prompt_template": "a Jinja file as `data.chat_template`, or a text with columns in it as `data.train.columns`",
    **_all("message_field_role message_field_content message_property_mappings roles", _TURNS),
    **_all("temperature top_p top_k do_sample num_beams predict_with_generate", _GREEDY),
    **_all("merge_lora export_dir", "remove it: `ftune merge RUN` merges"),
    **_all("sep delimiter header", "remove it: what lies between the values of a .csv is found out by its header"),
    "checkpointer": "remove it: `model.id` says what is loaded, and `output_dir` where it is saved",
    "ds_type": "remove it: a file's kind is known by how its name ends",
}
"""Names for which there is no field, and what to do instead."""

_OTHER_VALUES = {
    "dtype": {
        **_all("bf16 torch.bfloat16 bfloat", "bfloat16"),
        **_all("fp32 float torch.float32 full", "float32"),
        **_all("float16 fp16 half torch.float16", ""),
    },
    "attention": _all("flash_attn flash_attention fa2 flash flash_attn_2", "flash_attention_2"),
    "format": {
        **_all("chatml openai chat chat_template conversation conversational", "messages"),
        **_all("raw pretrain pretraining completion plain", "text"),
        **_all("instruct instruction", "alpaca"),
        "input_output": "prompt_completion",
    },
    "too_long": {
        **_all("cut trunc", "truncate"),
        **_all("drop discard", "skip"),
        **_all("chunk chunks window", "split"),
    },
    "train_on": {
        **_all("completion completions response responses answers output outputs", "assistant"),
        **_all("everything full inputs", "all"),
        **_all("last_turn final", "last"),
    },
    "optimizer.name": {
        **_all("adamw_torch adamw_torch_fused adamw_hf adamw_apex_fused", "adamw"),
        **_all("adamw_bnb_8bit adam8bit", "adamw_8bit"),
        "paged_adamw_32bit": "paged_adamw",
        **_all("adam sgd", ""),
    },
    "schedule.name": {
        **_all("constant_with_warmup", "constant"),
        **_all("cosine_with_min_lr cosine_decay", "cosine"),
        "linear_decay": "linear",
    },
    "method.name": {
        **{alias: name for name, method in METHODS.items() for alias in method.aliases},
        **_all("loha lokr oft boft", ""),
    },
}


def other_value(field: str, value: str) -> str | None:
    """What a value of another tool is called here; empty where it is near to one that means something else.

    Args:
        field: The field's path; its last name is enough.
        value: What was written.
    """
    for key in (field, field.rpartition(".")[2]):
        if (known := _OTHER_VALUES.get(key, {}).get(value.strip().lower().replace("-", "_"))) is not None:
            return known
    return None
