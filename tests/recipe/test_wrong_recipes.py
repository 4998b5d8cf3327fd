"""Ways to be wrong: (recipe, exit code, every line of the message)."""

from __future__ import annotations

import pytest

from qcompress import registry
from qcompress.errors import InputError, QcompressError
from qcompress.recipe import parse_recipe

HEAD = "version: 1\nrules:\n"
RULE = HEAD + '  - {match: "*", rtn: {bits: 4}}\n'


def rtn(options: str) -> str:
    return HEAD + f"  - match: a\n    rtn: {options}\n"


ANY_METHOD = ", ".join(f"`{name}`" for name in ("match", "keep", *registry.METHODS))
ANY_ACTION = ", ".join(f"`{name}`" for name in ("keep", *registry.METHODS))
ANY_KEY = (
    "`version`, `seed`, `keep_dtype`, `keep_coding`, `model`, `data`, `task`, `activations`, `companions`, `for`, "
    "`budget`, `gates`, `rules`, `finetune`"
)
ADD_MATCH = 'add `match: "*.weight"`, a glob over tensor names or a list of them'
GIVE_MATCH = 'give a glob over tensor names or a list of them, as "*.weight"'
QUOTE_STAR = 'put text that starts with * in quotes, as "*.weight"'

WRONG: dict[str, tuple[str, list[str]]] = {
    # The file as a whole.
    "empty": ("", ["r.yaml:1: the recipe is empty; start with `version: 1` and `rules:`"]),
    "only a comment": ("# x\n", ["r.yaml:1: the recipe is empty; start with `version: 1` and `rules:`"]),
    "a list": (
        "\n- a\n",
        ["r.yaml:2: a list is not a mapping; write `key: value` lines, the first one `version: 1`"],
    ),
    "a scalar": ("4\n", ["r.yaml:1: 4 is not a mapping; write `key: value` lines, the first one `version: 1`"]),
    "two documents": (RULE + "---\nversion: 1\n", ["r.yaml:4: a second YAML document; keep one recipe a file"]),
    "unclosed list": (
        "version: 1\nrules: [a,\nseed: 1",
        ["r.yaml:3: not YAML: expected ',' or ']', but got '<stream end>'; look at what starts on line 2"],
    ),
    "tab": (
        "version: 1\nrules:\n\t- a\n",
        ["r.yaml:3: not YAML: found character '\\t' that cannot start any token; indent with spaces, not tabs"],
    ),
    "colon": (
        "version: 1\nseed: a: b\n",
        [
            "r.yaml:2: not YAML: mapping values are not allowed here; "
            "check the indentation; text that holds `: ` needs quotes"
        ],
    ),
    "at sign": (
        "version: @1\n",
        ["r.yaml:1: not YAML: found character '@' that cannot start any token; put the text in quotes"],
    ),
    "bare glob": (
        HEAD + "  - match: *.weight\n",
        [f"r.yaml:3: not YAML: expected alphabetic or numeric character, but found '.'; {QUOTE_STAR}"],
    ),
    "control character": ("version: 1\na: \x07\n", ["r.yaml:2: character U+0007 is not allowed in YAML; remove it"]),
    "escape past Unicode": (
        'version: 1\nx: "\\UFFFFFFFF"\n',
        ["r.yaml:2: an escape names no Unicode character; correct the escape"],
    ),
    "escape just past Unicode": (
        'version: 1\nx: "\\U00110000"\n',
        ["r.yaml:2: an escape names no Unicode character; correct the escape"],
    ),
    "half a surrogate": (
        HEAD + '  - {match: "\\ud800", keep: {}}\n',
        ["r.yaml:3: rules[0].match: half a surrogate pair is no text; correct the escape"],
    ),
    # More than data.
    "anchor": (
        HEAD + "  - {match: a, rtn: &x {bits: 4}}\n",
        ["r.yaml:3: rules[0].rtn: anchor `&x`: a recipe has no anchors; remove it"],
    ),
    "alias": (
        HEAD + "  - {match: a, rtn: *x}\n",
        [f"r.yaml:3: rules[0].rtn: alias `*x`: a recipe has no aliases; {QUOTE_STAR}"],
    ),
    "merge key": (
        rtn("{bits: 4, <<: {axis: 0}}"),
        ["r.yaml:4: rules[0].rtn: merge key `<<`: a recipe has no anchors; write the values out"],
    ),
    "python tag": (
        RULE + 'seed: !!python/object/apply:os.system ["true"]\n',
        [
            "r.yaml:4: seed: tag `!!python/object/apply:os.system`: a recipe is nothing but data; remove the tag",
        ],
    ),
    "standard tag": (
        RULE + "seed: !!int 4\n",
        ["r.yaml:4: seed: tag `!!int`: a recipe is nothing but data; remove the tag"],
    ),
    "local tag": (RULE + "seed: !x 4\n", ["r.yaml:4: seed: tag `!x`: a recipe is nothing but data; remove the tag"]),
    "duplicate key": (
        rtn("\n      bits: 4\n      axis: 0\n      bits: 3"),
        ["r.yaml:7: rules[0].rtn: key `bits` is given twice, first at r.yaml:5; remove one of the two"],
    ),
    "key that is a number": (RULE + "1: 2\n", ["r.yaml:4: key `1` is not text; put it in quotes"]),
    "key that is a list": (RULE + "[a]: 2\n", ["r.yaml:4: a key that is not text; write `key: value`"]),
    # The frame.
    "no version": (RULE.removeprefix("version: 1\n"), ["r.yaml:1: `version` is missing; add `version: 1`"]),
    "later version": (
        "version: 2\nwhatever: 1\n",
        ["r.yaml:1: version: version 2 is not known; use `version: 1`, or a newer qcompress"],
    ),
    "version as text": (
        RULE.replace("1", '"1"', 1),
        ["r.yaml:1: version: `1` is not a version; write `version: 1`"],
    ),
    "version true": (
        RULE.replace("1", "true", 1),
        ["r.yaml:1: version: `true` is not a version; write `version: 1`"],
    ),
    "no rules": ("version: 1\nseed: 1\n", ["r.yaml:1: `rules` is missing; add `rules`, a list of rules"]),
    "empty rules": (
        "version: 1\nrules: []\n",
        ['r.yaml:2: rules: an empty list; write `rules: [{match: "*.weight", squant: {bits: 4}}]`'],
    ),
    "rules a mapping": (
        "version: 1\nrules: {match: a}\n",
        ['r.yaml:2: rules: a mapping is not a list; write `rules: [{match: "*.weight", squant: {bits: 4}}]`'],
    ),
    "unknown key": (
        RULE + "gate: {}\n",
        ["r.yaml:4: gate: unknown key `gate`; did you mean `gates`?"],
    ),
    "unknown key, none near": (
        RULE + "zzz: {}\n",
        ["r.yaml:4: zzz: unknown key `zzz`; valid here: " + ANY_KEY],
    ),
    "bits under a budget": (
        RULE + "budget: {bpw: 2}\n",
        ["r.yaml:3: rules[0].rtn.bits: the budget decides the bits; take `bits` out, or the budget"],
    ),
    "finetune without optimizer": (
        RULE + "finetune: {epochs: 2}\n",
        [
            "r.yaml:4: finetune: `optimizer` is missing; add `optimizer: {sgd: {lr: 0.001, momentum: 0.9}}`",
        ],
    ),
    "two optimizers": (
        RULE + "finetune: {optimizer: {sgd: {lr: 1.0}, adamw: {lr: 1.0}}}\n",
        ["r.yaml:4: finetune.optimizer: names 2 optimizers: `sgd`, `adamw`; keep one"],
    ),
    "nesterov without momentum": (
        RULE + "finetune: {optimizer: {sgd: {lr: 1.0, momentum: 0, nesterov: true}}}\n",
        ["r.yaml:4: finetune.optimizer.sgd: nesterov needs momentum; give momentum: 0.9"],
    ),
    "unknown schedule": (
        RULE + "finetune: {optimizer: {sgd: {lr: 1.0}}, schedule: linear}\n",
        [
            "r.yaml:4: finetune.schedule.linear: unknown schedule `linear`; valid here: `constant`, `cosine`, `step`",
        ],
    ),
    "two regularizers": (
        RULE + "finetune: {optimizer: {sgd: {lr: 1.0}}, regularize: [{match: a, l2: {}, linf: {}}]}\n",
        [
            "r.yaml:4: finetune.regularize[0]: names 2 regularizers: `l2`, `linf`; make it one rule each",
        ],
    ),
    "regularizer without match": (
        RULE + "finetune: {optimizer: {sgd: {lr: 1.0}}, regularize: [{l2: {}}]}\n",
        [
            "r.yaml:4: finetune.regularize[0]: `match` is missing; " + ADD_MATCH,
        ],
    ),
    "sine without minima": (
        RULE + "finetune: {optimizer: {sgd: {lr: 1.0}}, regularize: [{match: a, sine: {}}]}\n",
        [
            "r.yaml:4: finetune.regularize[0].sine: the minima are not said; "
            "give levels, or bits for the grid that quantize will use",
        ],
    ),
    "model without factory": (
        RULE + "model: {args: {a: 1}}\n",
        ['r.yaml:4: model: `factory` is missing; add `factory: "torchvision.models:resnet18"`'],
    ),
    "model with weights": (
        RULE + "model: {factory: a:b, args: {weights: DEFAULT}}\n",
        ["r.yaml:4: model.args.weights: `weights` is set; remove it: weights come from the checkpoint"],
    ),
    "model with an unknown key": (
        RULE + "model: {factory: a:b, arg: {}}\n",
        ["r.yaml:4: model.arg: unknown key `arg`; did you mean `args`?"],
    ),
    "data of no source": (
        RULE + "data:\n  eval: {samples: 3}\n",
        ["r.yaml:5: data.eval: names no data source; give one of `npz`, `images`, `dataset`, `text`, `factory`"],
    ),
    "data of two sources": (
        RULE + "data: {eval: {npz: a, images: b}}\n",
        [
            "r.yaml:4: data.eval: names 2 data sources: `npz`, `images`; "
            "give one of `npz`, `images`, `dataset`, `text`, `factory`"
        ],
    ),
    "data of an unknown part": (
        RULE + "data: {evil: {npz: a}}\n",
        ["r.yaml:4: data.evil: unknown key `evil`; did you mean `eval`?"],
    ),
    "no samples": (
        RULE + "data: {eval: {npz: a, samples: 0}}\n",
        ["r.yaml:4: data.eval.samples: 0 is out of range; must be at least 1"],
    ),
    "uneven normalization": (
        RULE + "data: {normalize: {mean: [0.5, 0.5], std: [0.5]}}\n",
        ["r.yaml:4: data.normalize: mean has 2 values and std 1; give one for each channel"],
    ),
    "unknown augmentation": (
        RULE + "data: {train: {npz: a, augment: [flop]}}\n",
        ["r.yaml:4: data.train.augment[0].flop: unknown augmentation `flop`; did you mean `flip`?"],
    ),
    "an augmentation without its size": (
        RULE + "data: {train: {npz: a, augment: [random_resized_crop]}}\n",
        ["r.yaml:4: data.train.augment[0].random_resized_crop: `size` is missing; add `size`, an integer at least 1"],
    ),
    "an unknown option of an augmentation": (
        RULE + "data: {train: {npz: a, augment: [flip, {mixup: {alfa: 1}}]}}\n",
        ["r.yaml:4: data.train.augment[1].mixup.alfa: unknown key `alfa`; did you mean `alpha`?"],
    ),
    "an augmentation that changes nothing": (
        RULE + "data: {train: {npz: a, augment: [color_jitter]}}\n",
        [
            "r.yaml:4: data.train.augment[0].color_jitter: color_jitter changes nothing; "
            "give brightness, contrast, saturation or hue"
        ],
    ),
    "a range from large to small": (
        RULE + "data: {train: {npz: a, augment: [{random_resized_crop: {size: 8, scale: [0.9, 0.5]}}]}}\n",
        [
            "r.yaml:4: data.train.augment[0].random_resized_crop: scale goes from 0.9 down to 0.5; "
            "give the smaller one first"
        ],
    ),
    "an augmentation twice": (
        RULE + "data: {train: {npz: a, augment: [flip, crop4, flip]}}\n",
        ["r.yaml:4: data.train.augment: augment has flip twice; remove one"],
    ),
    "a cut of the whole image after a change of it": (
        RULE + "data: {train: {npz: a, augment: [flip, {random_resized_crop: {size: 8}}]}}\n",
        [
            "r.yaml:4: data.train.augment: random_resized_crop is not the first of augment; "
            "put it there: it cuts whole images"
        ],
    ),
    "an augmentation of text": (
        RULE + "data: {train: {text: a, tokenizer: b, augment: [flip]}}\n",
        ["r.yaml:4: data.train.augment: augment is for images, and the data are text; leave it out"],
    ),
    "a change of mixed images": (
        RULE + "data: {train: {npz: a, augment: [mixup, flip]}}\n",
        ["r.yaml:4: data.train.augment: mixup is not at the end of augment; put it there: it mixes finished images"],
    ),
    "unknown task": (
        RULE + "task: {clasification: {}}\n",
        ["r.yaml:4: task.clasification: unknown task `clasification`; did you mean `classification`?"],
    ),
    "unknown metric": (
        RULE + "task: {classification: {metric: top2}}\n",
        ["r.yaml:4: task.classification.metric: unknown value `top2`; did you mean `top5`?"],
    ),
    "too few activation bits": (
        RULE + "activations: {bits: 0}\n",
        ["r.yaml:4: activations.bits: 0 is out of range; must be between 1 and 8"],
    ),
    "a companion twice": (
        RULE + "companions: [batch_norm, batch_norm]\n",
        ["r.yaml:4: companions[1]: `batch_norm` stands twice; remove one"],
    ),
    "an unknown companion": (
        RULE + "companions: [bias_corection]\n",
        ["r.yaml:4: companions[0]: unknown value `bias_corection`; did you mean `bias_correction`?"],
    ),
    "negative seed": (
        RULE + "seed: -1\n",
        ["r.yaml:4: seed: -1 is out of range; must be between 0 and 9223372036854775807"],
    ),
    "huge seed": (
        RULE + f"seed: {'9' * 5000}\n",
        [f"r.yaml:4: seed: `{'9' * 57}...` is too large a number; give a smaller one"],
    ),
    "real seed": (
        RULE + "seed: 1.0\n",
        ["r.yaml:4: seed: 1.0 is not an integer; give an integer between 0 and 9223372036854775807"],
    ),
    # Rules.
    "rule that is text": (
        HEAD + "  - a\n",
        ['r.yaml:3: rules[0]: `a` is not a mapping; write {match: "*.weight", squant: {bits: 4}}'],
    ),
    "no such role": (
        HEAD + '  - {match: ["*.weight", "@embeding"], rtn: {bits: 4}}\n',
        ["r.yaml:3: rules[0].match[1]: there is no role `@embeding`; did you mean `@embedding`?"],
    ),
    "no match": (
        HEAD + "  - rtn: {bits: 4}\n",
        ["r.yaml:3: rules[0]: `match` is missing; " + ADD_MATCH],
    ),
    "empty match": (
        HEAD + '  - {match: "", keep: {}}\n',
        ["r.yaml:3: rules[0].match: an empty text; " + GIVE_MATCH],
    ),
    "empty list of matches": (
        HEAD + "  - {match: [], keep: {}}\n",
        ["r.yaml:3: rules[0].match: an empty list; " + GIVE_MATCH],
    ),
    "number as match": (
        HEAD + "  - {match: [a, 3], keep: {}}\n",
        [
            "r.yaml:3: rules[0].match[1]: 3 is not a glob over tensor names; "
            'give a glob over tensor names, as "*.weight"'
        ],
    ),
    "no method": (
        HEAD + "  - {match: a}\n",
        ["r.yaml:3: rules[0]: names no method; give one of " + ANY_ACTION],
    ),
    "two methods": (
        HEAD + "  - {match: a, rtn: {bits: 4}, mse: {bits: 4}}\n",
        ["r.yaml:3: rules[0]: names 2 methods: `rtn`, `mse`; make it one rule each"],
    ),
    "unknown method": (
        HEAD + "  - {match: a, squand: {bits: 4}}\n",
        ["r.yaml:3: rules[0].squand: unknown key or method `squand`; did you mean `squant`?"],
    ),
    "unknown method, none near": (
        HEAD + "  - {match: a, zzz: {bits: 4}}\n",
        [f"r.yaml:3: rules[0].zzz: unknown key or method `zzz`; valid here: {ANY_METHOD}"],
    ),
    "keep with another dtype": (
        'version: 1\nrules:\n  - {match: "*", keep: {dtype: f8}}\n',
        ["r.yaml:3: rules[0].keep.dtype: unknown value `f8`; valid here: `f16`"],
    ),
    "keep_coding of another code": (
        'version: 1\nkeep_coding: packed\nrules:\n  - {match: "*", keep: {}}\n',
        ["r.yaml:2: keep_coding: unknown value `packed`; valid here: `auto`, `zstd`, `ans`"],
    ),
    "keep_dtype of another dtype": (
        'version: 1\nkeep_dtype: bf16\nrules:\n  - {match: "*", keep: {}}\n',
        ["r.yaml:2: keep_dtype: unknown value `bf16`; did you mean `f16`?"],
    ),
    "keep with options": (
        HEAD + "  - {match: a, keep: {bits: 4}}\n",
        ["r.yaml:3: rules[0].keep.bits: unknown key `bits`; valid here: `dtype`, `coding`"],
    ),
    "keep with nothing": (
        HEAD + "  - {match: a, keep: }\n",
        ["r.yaml:3: rules[0].keep: `null` is not a mapping; write `keep: {}`"],
    ),
    # Options.
    "options missing": (
        rtn(""),
        ["r.yaml:4: rules[0].rtn: `bits` is missing; add `bits: 4`, an integer between 1 and 8"],
    ),
    "options a number": (rtn("4"), ["r.yaml:4: rules[0].rtn: 4 is not a mapping; write `rtn: {bits: 4}`"]),
    "bit for bits": (
        rtn("{bit: 4}"),
        ["r.yaml:4: rules[0].rtn.bit: unknown key `bit`; did you mean `bits`?"],
    ),
    "value below its key": (
        rtn("\n      bits:\n\n        nine"),
        ["r.yaml:5: rules[0].rtn.bits: `nine` is not an integer; give an integer between 1 and 8"],
    ),
    "exclusion by a missing word": (
        rtn("{bits: 4, symetric: true, convention: narrow}"),
        ["r.yaml:4: rules[0].rtn.symetric: unknown key `symetric`; did you mean `symmetric`?"],
    ),
    "9 bits": (rtn("{bits: 9}"), ["r.yaml:4: rules[0].rtn.bits: 9 is out of range; must be between 1 and 8"]),
    "bits as text": (
        rtn('{bits: "4"}'),
        ["r.yaml:4: rules[0].rtn.bits: `4` is not an integer; give an integer between 1 and 8"],
    ),
    "bits true": (
        rtn("{bits: true}"),
        ["r.yaml:4: rules[0].rtn.bits: `true` is not an integer; give an integer between 1 and 8"],
    ),
    "bits null": (
        rtn("{bits: ~}"),
        ["r.yaml:4: rules[0].rtn.bits: `null` is not an integer; give an integer between 1 and 8"],
    ),
    "bits a real": (
        rtn("{bits: 4.0}"),
        ["r.yaml:4: rules[0].rtn.bits: 4.0 is not an integer; give an integer between 1 and 8"],
    ),
    "yes is text": (
        rtn("{bits: 4, symmetric: yes}"),
        ["r.yaml:4: rules[0].rtn.symmetric: `yes` is not true or false; give true or false"],
    ),
    "near choice": (
        rtn("{bits: 4, granularity: chanel}"),
        ["r.yaml:4: rules[0].rtn.granularity: unknown value `chanel`; did you mean `channel`?"],
    ),
    "no near choice": (
        rtn("{bits: 4, granularity: zzz}"),
        ["r.yaml:4: rules[0].rtn.granularity: unknown value `zzz`; valid here: `tensor`, `channel`, `group`"],
    ),
    "group of one": (
        rtn("{bits: 4, group_size: 1}"),
        ["r.yaml:4: rules[0].rtn.group_size: 1 is out of range; must be at least 2"],
    ),
    "axis as text": (
        rtn("{bits: 4, axis: [0, x]}"),
        [
            "r.yaml:4: rules[0].rtn.axis: a list is not an integer or a list of integers; "
            "give an integer or a list of integers"
        ],
    ),
    "one of a pair": (
        HEAD + "  - {match: a, dkm: {bits: 4, temperature_share: [1]}}\n",
        [
            "r.yaml:3: rules[0].dkm.temperature_share: a list is not a list of 2 numbers; give a list of 2 numbers",
        ],
    ),
    "infinite": (
        HEAD + "  - {match: a, hqq: {bits: 4, beta: .inf}}\n",
        ["r.yaml:3: rules[0].hqq.beta: `.inf` is not a finite number; give a finite number"],
    ),
    "two bounds": (
        HEAD + "  - {match: a, hqq: {bits: 4, norm: 0}}\n",
        ["r.yaml:3: rules[0].hqq.norm: 0 is out of range; must be above 0 and at most 1"],
    ),
    "options that exclude each other": (
        rtn("{bits: 4, granularity: channel, group_size: 8}"),
        ["r.yaml:4: rules[0].rtn: group_size needs granularity: group, not channel; see `rtn` in docs/recipes.md"],
    ),
    "exclusion with a mend": (
        rtn("{bits: 1, symmetric: true, convention: narrow}"),
        ["r.yaml:4: rules[0].rtn: a narrow grid of 1 bit has no step; use mid-rise"],
    ),
    # Gates.
    "gates a list": (
        RULE + "gates: [1]\n",
        ['r.yaml:4: gates: a list is not a mapping; write `gates: {max_size: "2MB"}`'],
    ),
    "unknown gate": (
        RULE + "gates: {max_sise: 2MB}\n",
        ["r.yaml:4: gates.max_sise: unknown key `max_sise`; did you mean `max_size`?"],
    ),
    "no size": (
        RULE + "gates: {max_size: 2M}\n",
        ["r.yaml:4: gates.max_size: `2M` is not a size; give bytes, or a number with KB, MB, GB, KiB, MiB or GiB"],
    ),
    "size true": (
        RULE + "gates: {max_size: true}\n",
        ["r.yaml:4: gates.max_size: `true` is not a size; give a number of bytes, or text like 2MB"],
    ),
    "size a real": (
        RULE + "gates: {max_size: 1.5}\n",
        ["r.yaml:4: gates.max_size: 1.5 is not a size; give a number of bytes, or text like 2MB"],
    ),
    "size zero": (RULE + "gates: {max_size: 0}\n", ["r.yaml:4: gates.max_size: 0 is out of range; must be at least 1"]),
    "bpw zero": (RULE + "gates: {max_bpw: 0}\n", ["r.yaml:4: gates.max_bpw: 0 is out of range; must be above 0"]),
    "metric as text": (
        RULE + "gates: {min_metric: {top1: high}}\n",
        ["r.yaml:4: gates.min_metric.top1: `high` is not a number; give a number"],
    ),
    "metrics a number": (
        RULE + "gates: {max_drop: 0.1}\n",
        ["r.yaml:4: gates.max_drop: 0.1 is not a mapping; write `max_drop: {top1: 0.1}`"],
    ),
    # Null stands for no options of a kind, and nowhere else for a mapping.
    "sections of nothing": (
        RULE + "data:\nactivations: ~\nfinetune: ~\nmodel: null\nkeep_dtype: ~\n",
        [
            'r.yaml:4: data: `null` is not a mapping; write `data: {eval: {npz: "val.npz"}}`',
            "r.yaml:5: activations: `null` is not a mapping; write `activations: {}`",
            "r.yaml:6: finetune: `null` is not a mapping; "
            "write `finetune: {optimizer: {sgd: {lr: 0.001, momentum: 0.9}}}`",
            'r.yaml:7: model: `null` is not a mapping; write `model: {factory: "torchvision.models:resnet18"}`',
            "r.yaml:8: keep_dtype: `null` is not one of `f16`; give one of `f16`",
        ],
    ),
    "a gate that is true": (
        RULE + "gates: {max_bpw: true}\n",
        ["r.yaml:4: gates.max_bpw: `true` is not a number; give a number above 0"],
    ),
    "a gate of nothing": (
        RULE + "gates: {max_bpw: }\n",
        ["r.yaml:4: gates.max_bpw: `null` is not a number; give a number above 0"],
    ),
    "budgets of two kinds": (
        "version: 1\nbudget:\n  size: 1MB\n  bpw: 2\n",
        ["r.yaml:3: budget.size: `bpw`, `size` are given together; keep one of them"],
    ),
    "a budget of none": (
        "version: 1\nbudget: {sensitivity: s.json}\n",
        ["r.yaml:2: budget: names no limit; write `budget: {bpw: 2.0}`, or {size: 1.2MB}"],
    ),
    "a budget over codebooks": (
        HEAD + "  - {match: a, kmeans: {}}\nbudget: {bpw: 2}\n",
        [
            "r.yaml:3: rules[0].kmeans: `bits` is missing; add `bits: 4`, an integer between 1 and 12",
            "r.yaml:4: budget: a budget decides the widths of grids, and `kmeans` makes codebooks; "
            "remove it, or use a method of quantize",
        ],
    ),
    "options that no width takes": (
        HEAD + "  - {match: a, rtn: {convention: narrow}}\nbudget: {bpw: 2}\n",
        ["r.yaml:3: rules[0].rtn: convention needs symmetric: true; see `rtn` in docs/recipes.md"],
    ),
    # Sources and kinds: what is wrong in one is said in its own words.
    "sources that are no mappings": (
        RULE + "data:\n  calibration: folder\n  train: {npz: t.npz, augment: flip}\n  normalize: {mean: 0.5}\n",
        [
            'r.yaml:5: data.calibration: `folder` is not a mapping; write `calibration: {npz: "val.npz"}`',
            "r.yaml:6: data.train.augment: `flip` is not a list; write `augment: [flip, crop4]`",
            "r.yaml:7: data.normalize: `std` is missing; add `std: [0.5]`",
            "r.yaml:7: data.normalize.mean: 0.5 is not a list; give a list of numbers",
        ],
    ),
    "no list": (
        RULE + "companions: batch_norm\n",
        ["r.yaml:4: companions: `batch_norm` is not a list; give a list of `bias_correction`, `batch_norm`"],
    ),
    "an option of another source": (
        RULE + "data: {train: {text: t.txt, tokenizer: t, crops: 8, length: 1}}\n",
        [
            "r.yaml:4: data.train.crops: unknown key `crops`; valid here: `samples`, `batch_size`, `shuffle`, `text`, "
            "`tokenizer`, `target`, `labels`, `length`, `augment`",
            "r.yaml:4: data.train.length: 1 is out of range; must be at least 2",
        ],
    ),
    "a source without its tokenizer": (
        RULE + "data: {eval: {text: t.txt, shuffle: 1}}\n",
        [
            "r.yaml:4: data.eval: `tokenizer` is missing; add `tokenizer`",
            "r.yaml:4: data.eval.shuffle: 1 is not true or false; give true or false",
        ],
    ),
    "an augmentation of data that are not trained on": (
        RULE + "data: {eval: {npz: a, augment: [flip]}}\n",
        [
            "r.yaml:4: data.eval.augment: unknown key `augment`; valid here: `samples`, `batch_size`, `shuffle`, "
            "`npz`, `inputs`, `labels`, `scale`, `zero_point`, `lengths`",
        ],
    ),
    "a task that is no name": (
        RULE + "task: 4\n",
        [
            "r.yaml:4: task: 4 is not a mapping or one of `classification`, `sequence-classification`, `causal-lm`, "
            "`translation`, `reconstruction`; write `task: {classification: {metric: top1}}`",
        ],
    ),
    "regularizers kept with options": (
        RULE + "finetune: {optimizer: {sgd: {lr: 1.0}}, regularize: [{match: a, keep: {dtype: f16}}]}\n",
        ["r.yaml:4: finetune.regularize[0].keep.dtype: unknown key `dtype`; leave it out"],
    ),
    "no learning rate": (
        RULE + "finetune: {optimizer: sgd}\n",
        ["r.yaml:4: finetune.optimizer.sgd: `lr` is missing; add `lr`, a number above 0"],
    ),
    # What could disturb a terminal is escaped.
    "escape sequence": (
        RULE + '"\\e[31m": 1\n',
        [
            "r.yaml:4: \\x1b[31m: unknown key `\\x1b[31m`; valid here: " + ANY_KEY,
        ],
    ),
    "several, by line": (
        "seed: x\nversion: 1\nrules:\n  - {match: a, rtn: {bits: 0, axes: 1}}\n  - {match: b}\nsead: 1\n",
        [
            "r.yaml:1: seed: `x` is not an integer; give an integer between 0 and 9223372036854775807",
            "r.yaml:4: rules[0].rtn.bits: 0 is out of range; must be between 1 and 8",
            "r.yaml:4: rules[0].rtn.axes: unknown key `axes`; did you mean `axis`?",
            "r.yaml:5: rules[1]: names no method; give one of " + ANY_ACTION,
            "r.yaml:6: sead: unknown key `sead`; did you mean `seed`?",
        ],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_message(case: str) -> None:
    text, expected = WRONG[case]
    with pytest.raises(QcompressError) as caught:
        parse_recipe(text, "r.yaml")
    assert caught.value.lines() == expected
    assert caught.value.exit_code == 3


def test_parts_of_an_error() -> None:
    with pytest.raises(InputError) as caught:
        parse_recipe(rtn("{bit: 4}"), "recipe.yaml")
    error = caught.value
    assert error.where == "recipe.yaml:4: rules[0].rtn.bit"
    assert error.what == "unknown key `bit`"
    assert error.hint == "did you mean `bits`?"


def test_one_family() -> None:
    codes = "  - {match: b, kmeans: {bits: 2}}\n"
    keep = "  - {match: c, keep: {}}\n"
    assert parse_recipe(HEAD + keep + codes, "r.yaml").family == "cluster"
    assert parse_recipe(HEAD + keep, "r.yaml", family="cluster").family == "cluster"
    assert parse_recipe(RULE, "r.yaml", family="cluster").family == "quantize"
    with pytest.raises(InputError) as caught:
        parse_recipe(RULE + keep + codes, "r.yaml")
    what = "`kmeans` is a cluster method, but rules[0].rtn is of family quantize"
    assert caught.value.lines() == [f"r.yaml:5: rules[2].kmeans: {what}; a recipe holds one family: make two recipes"]


def test_one_mistake_in_many_rules_is_one_line() -> None:
    with pytest.raises(InputError) as caught:
        parse_recipe(HEAD + "  - {match: a, rtn: {bit: 4}}\n" * 150, "r.yaml")
    places = [f"r.yaml:{line}: rules[{line - 3}].rtn" for line in range(3, 7)]
    keys = ", ".join(f"{place}.bit" for place in places[1:])
    what = "unknown key `bit`; did you mean `bits`?"
    assert caught.value.lines() == [f"{places[0]}.bit (also {keys} and 146 more): {what}"]


def test_causes_are_counted_past_a_hundred() -> None:
    with pytest.raises(InputError) as caught:
        parse_recipe(HEAD + "".join(f"  - {{match: a, rtn: {{bits: {9 + n}}}}}\n" for n in range(150)), "r.yaml")
    lines = caught.value.lines()
    assert len(lines) == 101
    assert lines[0].startswith("r.yaml:3: ")
    assert lines[-1] == "50 more causes are not shown; mend these first"
