"""The tables and figures of pages 08 to 16 as one graph: the runs, then the notebooks that show them.

    snakemake -j 2                              # all of it at `laptop` size; what `make figures` calls
    snakemake -j 8 --config preset=smoke seeds=0,1 benchmarks=phantom   # small, on eight cores
    snakemake --profile profiles/slurm          # the same graph on a SLURM cluster

Each seed of each setting is a job of its own, so `-j` (cores) spreads the runs over processes or machines.
Phases lock themselves, so what two jobs share is made once. The embedded policy's runs take one thread each:
on two cores, two runs at a time are done sooner than one after the other on two threads. Give
`--config threads=2` only where there are more cores than runs. A notebook makes what is still missing, on as
many threads.

A graph that is killed takes its jobs with it, and goes on when it is started again. Done jobs are done again
only when their notebook, the package or a parameter changed. The runs inside them are made again only where
the version of their code or their configuration is another.
"""

import fcntl
import json
import os
import re
import sys
from pathlib import Path

from valor.config import parse_settings, preset as configure, runs_dir, sweeps


def listed(name, default):
    "The values of `--config NAME=VALUE,VALUE`."
    return [value for value in str(config.get(name, default)).split(",") if value]


def whole_numbers(name, default):
    "The same, where every value must be a whole number."
    values = listed(name, default)
    if not values or not all(value.isdigit() for value in values):
        raise WorkflowError(f"--config {name}={config[name]}: expected whole numbers separated by commas")
    return [int(value) for value in values]


PRESET = config.get("preset", "laptop")
BENCHMARKS = listed("benchmarks", "phantom,openi_rendered")
PYTHON = config.get("python", sys.executable)
SEEDS = whole_numbers("seeds", "0,1,2,3")
try:
    DEFAULT = [configure(PRESET, benchmark=benchmark, seed=SEEDS[0]) for benchmark in BENCHMARKS][0]
except (ValueError, IndexError) as error:
    raise WorkflowError(f"--config: {error}")

THREADS = int(config.get("threads", 1 if DEFAULT.base == "embedded" else DEFAULT.threads))
os.environ.update(OMP_WAIT_POLICY="PASSIVE", TOKENIZERS_PARALLELISM="false", VALOR_ENDS_WITH=str(os.getpid()))
GRAPH = os.path.relpath(runs_dir() / "graph" / PRESET)
CODE = sorted(map(str, Path("valor").rglob("[a-z]*.py")))

if workflow.is_main_process:
    # The system takes this lock back when we die. Who gets it knows that snakemake's own locks are left over
    # from a graph that was killed. If another graph lives, snakemake says so itself.
    os.makedirs(".snakemake", exist_ok=True)
    ALIVE = open(".snakemake/valor.alive", "w")
    try:
        fcntl.flock(ALIVE, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for left in Path(".snakemake/locks").glob("*"):
            left.unlink()
    except BlockingIOError:
        pass

# ---- pages: the notebooks that take parameters, and the runs that each shows


def parameters(page):
    "Names of the parameters of a notebook; none where it has no cell for them."
    cells = json.loads(Path(f"nbs/{page}.ipynb").read_text())["cells"]
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    return re.findall(r"^(\w+) *=", "".join(tagged[0]["source"]), re.M) if tagged else []


NOTEBOOKS = sorted(path.stem for path in Path("nbs").glob("[0-9]*.ipynb"))
TAKES = {page: names for page in NOTEBOOKS if (names := parameters(page))}
PAGES = listed("pages", ",".join(TAKES))
if unknown := [page for page in PAGES if page not in TAKES]:
    raise WorkflowError(
        f"--config pages={','.join(unknown)}: no such page; expected some of {', '.join(TAKES)}"
    )

SWEEPS = sweeps(DEFAULT)  # of 08_ablation
PAPERS = ["lambda_vis", "k_clin"]  # those of Tables 3 and 4
OTHERS = [name for name in SWEEPS if name not in PAPERS]
MORE = {"08_ablation+more": dict(sweep=OTHERS)}  # pages shown a second time: {page+name: what they are told}


def notebook_of(page):
    "The notebook of a page; `08_ablation+more` is `08_ablation` a second time."
    return page.partition("+")[0]


def given(page, benchmark):
    "What a page is told: as much of preset, benchmark and seed(s) as it has parameters for."
    takes = TAKES[notebook_of(page)]
    values = dict(preset=PRESET, benchmark=benchmark, seeds=SEEDS, seed=SEEDS[0], threads=THREADS)
    if "seeds" in takes:
        del values["seed"]
    return {name: value for name, value in values.items() if name in takes} | MORE.get(page, {})


def as_text(change):
    "A change of the configuration as a job's name: `group_size=4,batch_size=8`."
    values = {name: value if isinstance(value, str) else json.dumps(value) for name, value in change.items()}
    return ",".join(f"{name}={value}" for name, value in values.items())


def settings(names):
    "Jobs of the sweeps `names`."
    changes = [change for name in names for change in SWEEPS[name].values()]
    own = vars(DEFAULT).items()
    return [as_text(change) for change in changes if not change.items() <= own]


PROGRESS = ["lambda_vis=0.0", f"lambda_vis={DEFAULT.lambda_vis}", "lambda_vis=1.0", "k_clin=1", "k_clin=null"]


def kinds_of(page):
    "Names of the jobs of one seed that a page waits for."
    if page.startswith("08"):
        return settings(OTHERS if page in MORE else PAPERS)
    if page.startswith("11"):
        return [f"progress/{setting}" for setting in PROGRESS]
    return ["systems"]


def runs_of(page, benchmark):
    "The jobs that a page waits for."
    seeds = SEEDS if "seeds" in TAKES[notebook_of(page)] else SEEDS[:1]
    return [f"{GRAPH}/{benchmark}/seed{seed}/{kind}" for seed in seeds for kind in kinds_of(page)]


def shown():
    "All pages: the paper's tables on every benchmark, the rest on the first."
    pages = [*PAGES, *(page for page in MORE if notebook_of(page) in PAGES)]
    on_all = [page for page in pages if page.startswith(("08_ablation", "09")) and page not in MORE]
    return [
        f"{GRAPH}/{benchmark}/{page}.ipynb"
        for page in pages
        for benchmark in (BENCHMARKS if page in on_all else BENCHMARKS[:1])
    ]


# ---- what it will take, said before anything runs


def phases_of(job):
    "(phase, configuration, what for) of everything that `job`, a path of `runs_of`, makes."
    from valor.runs.systems import phase_of, systems_on  # takes seconds, and every job reads this file

    benchmark, seed, kind = re.fullmatch(rf"{re.escape(GRAPH)}/(\w+)/seed(\d+)/(.+)", job).groups()
    basic = dict(benchmark=benchmark, seed=int(seed), threads=THREADS)
    if kind == "systems":
        cfg = configure(PRESET, **basic)
        rows = [(*phase_of(system, cfg), system) for system in systems_on(benchmark)]
        return [*rows, ("controls", cfg, "")]
    setting = kind.removeprefix("progress/")
    cfg = configure(PRESET, **basic | parse_settings(setting.split(",")))
    wanted = ["progress_stage1", "progress_stage2"] if kind != setting else ["eval_stage2"]
    return [(phase, cfg, setting) for phase in wanted]


def forecast(cores):
    "How many phases the graph makes, how long they take on `cores` cores, and where they lie."
    from valor.runs.plan import device_name, estimates, plan_notes, steps_for

    pages = [Path(path) for path in shown()]
    jobs = {job for page in pages for job in runs_of(page.stem, page.parent.name)}
    steps = steps_for(phase for job in sorted(jobs) for phase in phases_of(job))
    expected = estimates(steps)
    notes = plan_notes(steps, expected)
    known = sum(estimate.seconds or 0 for estimate in expected.values())
    if known:
        notes.append(f"with {cores} jobs at a time about {known / 3600 / max(1, cores // THREADS):.1f} hours")
    if any(estimate.seconds is None for estimate in expected.values()):
        notes.append("a seed of preset `laptop` took about an hour of one core of an Intel Xeon, per benchmark")
    return [*notes, f"on {device_name()}, {THREADS} thread(s) a job; runs in {runs_dir()}"]


onstart:
    for line in forecast(workflow.cores):
        print(line, file=sys.stderr)


# ---- jobs

JOB = """import json, sys
from valor.config import preset
from valor.runs.makers import check_scorers
from valor.runs.phases import check_updates, ensure
from valor.runs.systems import phase_of, systems_on
cfg, phases = preset(**json.loads(sys.argv[1])), sys.argv[2:]
check_updates("stage1", cfg)
check_scorers([cfg])
for phase in phases: ensure(phase, cfg)
if not phases:
    for system in systems_on(cfg.benchmark): ensure(*phase_of(system, cfg))
    ensure("controls", cfg)
"""


def told(w, setting=""):
    "The configuration of a job as JSON: its benchmark and seed, and the change `setting`."
    basic = dict(name=PRESET, benchmark=w.benchmark, seed=int(w.seed), threads=THREADS)
    return json.dumps(basic | parse_settings(filter(None, setting.split(","))))


wildcard_constraints:
    benchmark=r"\w+",
    seed=r"\d+",
    setting=r"[a-z_]+=[^/]+",


rule all:
    input:
        shown(),


rule systems:  # every row of Table 1, for one seed of one benchmark
    input:
        CODE,
    output:
        touch(f"{GRAPH}/{{benchmark}}/seed{{seed}}/systems"),
    params:
        cfg=told,
    threads: THREADS
    shell:
        "{PYTHON} -c {JOB:q} {params.cfg:q}"


rule setting:  # one setting of Tables 3 and 4; what it shares with the systems is there already
    input:
        CODE,
        f"{GRAPH}/{{benchmark}}/seed{{seed}}/systems",
    output:
        touch(f"{GRAPH}/{{benchmark}}/seed{{seed}}/{{setting}}"),
    params:
        cfg=lambda w: told(w, w.setting),
    threads: THREADS
    shell:
        "{PYTHON} -c {JOB:q} {params.cfg:q} eval_stage2"


rule progress:  # the same, evaluated while it trained
    input:
        CODE,
        f"{GRAPH}/{{benchmark}}/seed{{seed}}/systems",
    output:
        touch(f"{GRAPH}/{{benchmark}}/seed{{seed}}/progress/{{setting}}"),
    params:
        cfg=lambda w: told(w, w.setting),
    threads: THREADS
    shell:
        "{PYTHON} -c {JOB:q} {params.cfg:q} progress_stage1 progress_stage2"


rule page:
    input:
        CODE,
        lambda w: runs_of(w.page, w.benchmark),
        notebook=lambda w: f"nbs/{notebook_of(w.page)}.ipynb",
    output:
        f"{GRAPH}/{{benchmark}}/{{page,[0-9][^/]*}}.ipynb",
    params:
        given=lambda w: json.dumps(given(w.page, w.benchmark)),
    threads: DEFAULT.threads
    shell:
        "{PYTHON} -m papermill {input.notebook} {output} -y {params.given:q} --no-progress-bar"
