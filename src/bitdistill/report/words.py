"""Numbers and stages in words, the same everywhere in the report."""

from .records import StepRecord

MISSING = "not recorded"
STAGES = {
    "stage1_refine": "stage 1, refinement",
    "stage2_pretrain": "stage 2, continued pre-training",
    "stage3_distill": "stage 3, distillation-based fine-tuning",
    "sft": "fine-tuning on the task",
}
SHORT_STAGES = {
    "stage1_refine": "refine",
    "stage2_pretrain": "pretrain",
    "stage3_distill": "distill",
    "sft": "fine-tune",
}


METRICS = {
    "exact_match": "exact match",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
    "bleu": "BLEU",
    "no_label": "answers that are no label",
}


def metric_name(key: str) -> str:
    """A metric as a reader knows it."""
    return METRICS.get(key, key.replace("_", " "))


def heading(text: str) -> str:
    """With a capital at the beginning, and the others left alone."""
    return text[:1].upper() + text[1:]


def percent(share: float | None, digits: int = 2) -> str:
    """A share as a percentage."""
    return MISSING if share is None else f"{100 * share:.{digits}f}%"


def human_bytes(size: float | None) -> str:
    """Bytes in decimal units with three significant digits."""
    if size is None:
        return MISSING
    units = ["bytes", "kB", "MB", "GB"]
    while size >= 999.5 and len(units) > 1:
        size /= 1000
        units.pop(0)
    unit = units[0]
    return f"{size:.0f} {unit}" if unit == "bytes" or size >= 99.95 else f"{size:#.3g} {unit}"


def duration(seconds: float | None) -> str:
    """Seconds as a person would say them."""
    if seconds is None:
        return MISSING
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def users(step: StepRecord, num_methods: int) -> str:
    """Labels of the methods that a step serves."""
    return "every method" if len(step.used_by) == num_methods > 1 else ", ".join(step.used_by)


def is_base(step: StepRecord) -> bool:
    """Whether a step pre-trained a base."""
    settings = step.run.get("settings")
    return isinstance(settings, dict) and settings.get("part") == "base"


def stage_name(step: StepRecord) -> str:
    """The stage in the paper's words; the making of a base runs the code of stage 2 but is no stage."""
    if is_base(step):
        return "base, made from scratch"
    return STAGES.get(step.stage, step.stage) or MISSING
