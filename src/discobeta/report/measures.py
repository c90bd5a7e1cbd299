"""How the numbers of metrics.json are called and printed."""

from __future__ import annotations

from dataclasses import dataclass

from discobeta.design.arms import IDEAS, Arm, State


def one_line(title: str) -> str:
    """A title without its line breaks."""
    return title.replace("-\n", "-").replace("\n", " ")


@dataclass(frozen=True)
class Metric:
    """How a number of metrics.json is printed."""

    name: str
    title: str  # with a line break where a narrow column may have one
    decimals: int
    better: str = ""  # ↑ if higher is better, ↓ if lower, nothing if it is neither
    unit: str = ""

    @property
    def header(self) -> str:
        """Heading of a column: title, unit and direction."""
        title = f"{self.title}\n({self.unit})" if self.unit else self.title
        return f"{title}\u00a0{self.better}" if self.better else title

    @property
    def words(self) -> str:
        return one_line(self.title)


PANELS = {
    "predictions": [
        Metric("accuracy", "Accuracy", 3, "↑"),
        Metric("nll", "NLL", 4, "↓", "nats"),
        Metric("excess_kl", "KL(truth ‖\nmodel)", 4, "↓", "nats"),
        Metric("brier", "Brier", 4, "↓"),
        Metric("ece", "ECE", 3, "↓"),
    ],
    "heads": [
        Metric("sigma_spearman", "ρ(σ, true σ)", 3, "↑"),
        Metric("mean_log_sigma", "Mean\nlog σ/σ₀", 3),
        Metric("sd_log_sigma", "SD of\nlog σ/σ₀", 3),
        Metric("mean_log_s", "Mean\nlog s", 3),
        Metric("sd_log_s", "SD of\nlog s", 3),
        Metric("log_s_noise", "r(log s,\nnoise)", 3),
        Metric("log_s_familiarity", "r(log s,\nfamiliarity)", 3),
    ],
    "votes": [
        Metric("votes/kl", "KL(votes ‖\nmodel)", 4, "↓", "nats"),
        Metric("votes/brier", "Brier\n(votes)", 4, "↓"),
        Metric("votes/ece", "ECE\n(votes)", 3, "↓"),
        Metric("votes/accuracy_unanimous", "Accuracy,\nunanimous", 3, "↑"),
        Metric("votes/accuracy_split", "Accuracy,\nsplit", 3, "↑"),
        Metric("votes/sigma_spearman", "ρ(σ,\ndisagreement)", 3, "↑"),
        Metric("votes/sigma_partial", "the same,\ngiven the margin", 3, "↑"),
        Metric("votes/log_s_spearman", "ρ(log s,\ndisagreement)", 3, "↓"),
        Metric("votes/log_s_partial", "the same,\ngiven the margin", 3, "↓"),
    ],
    "policy": [
        Metric("kl_per_sequence", "KL to\nreference", 3, unit="nats"),
        Metric("kl_rao_blackwell", "KL, Rao-\nBlackwell", 3, unit="nats"),
        Metric("true_reward", "True\nreward", 3, "↑"),
        Metric("regret", "Regret", 3, "↓"),
        Metric("win_rate", "Win rate", 3, "↑"),
        Metric("reward_gain", "Reward\ngain", 3, "↑", "sd"),
    ],
    "responses": [
        Metric("well_formed", "Well\nformed", 3, "↑"),
        Metric("response_length", "Tokens per\nresponse", 1),
        Metric("eos_rate", "Ended", 3, "↑"),
        Metric("question_share", "Share of\nquestions", 3),
        Metric("question_kl", "KL at\nthe mark", 3, unit="nats"),
    ],
    "ranking": [
        Metric("best_of_4/true_reward", "True reward,\nbest of 4", 3, "↑"),
        Metric("best_of_16/true_reward", "True reward,\nbest of 16", 3, "↑"),
        Metric("within_prompt_spearman", "ρ within\na prompt", 3, "↑"),
        Metric("score_spread_ratio", "Spread, least\nover most noise", 2),
    ],
    "calibration": [
        Metric("calibration/accuracy", "Accuracy", 3, "↑"),
        Metric("calibration/nll", "NLL", 4, "↓", "nats"),
        Metric("calibration/excess_kl", "KL(truth ‖\nmodel)", 4, "↓", "nats"),
    ],
}
"""Metrics by the question that they answer, in the order of the columns."""

METRICS = {metric.name: metric for metrics in PANELS.values() for metric in metrics}

FURTHER = [
    Metric("posthoc/temperature/nll", "NLL,\ntemperature", 4, "↓", "nats"),
    Metric("posthoc/topic_scale/nll", "NLL, scale\nper topic", 4, "↓", "nats"),
    Metric("posthoc/sigma/nll", "NLL,\npost-hoc σ", 4, "↓", "nats"),
    Metric("posthoc/temperature/excess_kl", "KL,\ntemperature", 4, "↓", "nats"),
    Metric("posthoc/topic_scale/excess_kl", "KL, scale\nper topic", 4, "↓", "nats"),
    Metric("posthoc/sigma/excess_kl", "KL,\npost-hoc σ", 4, "↓", "nats"),
    Metric("tuned/pref_beta", "β chosen on\ncalibration pairs", 2),
    Metric("cost/seconds", "Training", 1, "↓", "seconds"),
]
"""Of runs, beside METRICS: no columns of the tables of a stage."""

POSTHOC = {
    "temperature": "post-hoc temperature",
    "topic_scale": "post-hoc scale per topic",
    "sigma": "post-hoc σ",
}
"""What evaluation fits on calibration pairs to a frozen baseline -> what tables call it."""

MEASURES = METRICS | {metric.name: metric for metric in FURTHER}

LANDMARKS = {
    "bayes_accuracy": "Bayes limit of the accuracy",
    "oracle_nll": "NLL of the oracle",
    "votes/entropy": "mean entropy of the votes on a pair",
    "votes/unanimous": "share of the pairs with several votes that are unanimous",
    "reference_true_reward": "true reward of the reference's own responses",
}
"""Properties of the held-out rows and of the reference, the same in every arm."""

PREDICTED = ("probability", "mean_margin")
GAINED = ("true_reward", "reference_true_reward", "noise")
SIGMAS = ("sigma_chosen", "sigma_rejected", "chosen_sigma", "rejected_sigma")
SCALES = ("log_s", "noise", "familiarity")
"""What figures draw of examples.parquet: of pairs, of the world's prompts, of a used Disco Head (what it says, and what
is true), and of a used Beta Head."""

DRAWN = ("loss", "accuracy", "eval_loss", "eval_accuracy", "reward", "kl_per_sequence", "response_length")
"""What figures draw of log.jsonl."""

TESTED = ("nll", "true_reward")
"""What the hypotheses of docs/predictions.md are about: only these are tested, and corrected for."""


def arm_text(name: str) -> str:
    """An arm as people call it: `baseline`, `Disco + LeDPO`; with idle heads, `LeDPO, idle Disco Head`."""
    arm = Arm.from_name(name)
    idle = [idea.key.capitalize() for idea in IDEAS if arm.state(idea.key) is State.IDLE]
    return f"{arm.label}, idle {' and '.join(idle)} Head{'s' * (len(idle) > 1)}" if idle else arm.label
