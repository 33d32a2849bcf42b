"""A trainer with our rollout on a miniature policy, as the tests of the rollout take it."""

from trl import GRPOConfig

from valor.policy.models import lora_config
from valor.policy.prompt import conversations
from valor.train.rollout import SharedRollout


def letters(completions, **columns):
    "A reward that costs nothing: how long a report is."
    return [float(len(c[-1]["content"])) for c in completions]


def shared_rollout(model, processor, data, out, share, rank, **changes):
    "`SharedRollout` for two updates, groups of three; `rank`: of the adapter; `changes`: of TRL's arguments."
    args = dict(
        num_generations=3,
        max_completion_length=7,
        max_steps=2,
        beta=0.05,
        loss_type="grpo",
        use_bias_correction_kl=False,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    return SharedRollout(
        model,
        reward_funcs=letters,
        args=GRPOConfig(str(out), **args | changes),
        train_dataset=conversations(data),
        processing_class=processor,
        peft_config=lora_config(model, "language+projector", rank, 2 * rank),
        share=share,
    )
