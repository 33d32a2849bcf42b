"""Every table and figure as one graph: the runs, then the notebooks that show them.

    snakemake -j 2                                                      # all of it at `laptop` size; what `make figures` calls
    snakemake -j 8 --config preset=smoke seeds=0,1 benchmarks=phantom   # small, on eight cores
    snakemake --profile profiles/slurm                                  # the same graph on a SLURM cluster

Each seed of each setting is a job of its own, so `-j` (cores) spreads the runs over processes or machines; phases lock themselves, what two jobs share is made once. The embedded policy's runs take one
thread each: on two cores, two runs at a time are done sooner than one after the other on two threads (`--config threads=2` is for more cores than runs). A notebook makes what is still missing, on as many threads. A graph that is killed takes its jobs with it, and goes on when it is started again. Done jobs are done again only when their notebook, the package or a parameter changed; runs inside them never are, unless their own code version or configuration is another.
"""
import fcntl, json, os, re, sys
from pathlib import Path
from valor.config import parse_settings, preset as configure, runs_dir, sweeps

def listed(name, default): return [x for x in str(config.get(name, default)).split(",") if x]

PRESET, BENCHMARKS = config.get("preset", "laptop"), listed("benchmarks", "phantom,openi_rendered")
PYTHON = config.get("python", sys.executable)
SEEDS = [int(s) for s in listed("seeds", "0,1,2,3") if s.isdigit()]
if SEEDS == [] or len(SEEDS) < len(listed("seeds", "0,1,2,3")): raise WorkflowError(f"--config seeds={config['seeds']}: expected whole numbers separated by commas")
try: DEFAULT = [configure(PRESET, benchmark=b, seed=s) for b in BENCHMARKS for s in SEEDS][0]
except (ValueError, IndexError) as e: raise WorkflowError(f"--config: {e}")

THREADS = int(config.get("threads", 1 if DEFAULT.base == "embedded" else DEFAULT.threads))
os.environ.update(OMP_WAIT_POLICY="PASSIVE", TOKENIZERS_PARALLELISM="false", VALOR_ENDS_WITH=str(os.getpid()))
GRAPH = os.path.relpath(runs_dir() / "graph" / PRESET)
CODE = sorted(map(str, Path("valor").rglob("[a-z]*.py")))

if workflow.is_main_process:    # the system takes this lock back when we die; who gets it knows that snakemake's own are left over from one that was killed
    os.makedirs(".snakemake", exist_ok=True)
    ALIVE = open(".snakemake/valor.alive", "w")
    try:
        fcntl.flock(ALIVE, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for left in Path(".snakemake/locks").glob("*"): left.unlink()
    except BlockingIOError: pass                                                 # another one lives, and snakemake will say so

# ---- pages: the notebooks that take parameters, and the runs that each shows

def parameters(page):
    "Names of the parameters of a notebook; none where it has no cell for them."
    cells = [c for c in json.loads(Path(f"nbs/{page}.ipynb").read_text())["cells"] if "parameters" in c["metadata"].get("tags", [])]
    return re.findall(r"^(\w+) *=", "".join(cells[0]["source"]), re.M) if cells else []

TAKES = {p.stem: names for p in sorted(Path("nbs").glob("[0-9]*.ipynb")) if (names := parameters(p.stem))}
PAGES = listed("pages", ",".join(TAKES))
if unknown := [p for p in PAGES if p not in TAKES]: raise WorkflowError(f"--config pages={','.join(unknown)}: no such page; expected some of {', '.join(TAKES)}")

SWEEPS, PAPERS = sweeps(DEFAULT), ["lambda_vis", "k_clin"]      # of 08_ablation, and those of Tables 3 and 4
OTHERS = [n for n in SWEEPS if n not in PAPERS]
MORE = {"08_ablation+more": dict(sweep=OTHERS)}                 # pages shown a second time: {page+name: what they are told}

def notebook_of(page): return page.partition("+")[0]

def given(page, benchmark):
    "What a page is told: as much of preset, benchmark and seed(s) as it has parameters for."
    takes = TAKES[notebook_of(page)]
    values = dict(preset=PRESET, benchmark=benchmark, seeds=SEEDS, seed=SEEDS[0], threads=THREADS)
    return {n: v for n, v in values.items() if n in takes and not (n == "seed" and "seeds" in takes)} | MORE.get(page, {})

def settings(names):
    "Jobs of the sweeps `names`, as changes of the configuration: `group_size=4,batch_size=8`."
    return [",".join(f"{n}={v if isinstance(v, str) else json.dumps(v)}" for n, v in change.items()) for name in names for change in SWEEPS[name].values() if change]

PROGRESS = ["lambda_vis=0.0", f"lambda_vis={DEFAULT.lambda_vis}", "lambda_vis=1.0", "k_clin=1", "k_clin=null"]

def runs_of(page, benchmark):
    "The jobs that a page waits for."
    seeds = SEEDS if "seeds" in TAKES[notebook_of(page)] else SEEDS[:1]
    jobs = settings(OTHERS if page in MORE else PAPERS) if page.startswith("08") else [f"progress/{s}" for s in PROGRESS] if page.startswith("11") else ["systems"]
    return [f"{GRAPH}/{benchmark}/seed{s}/{x}" for s in seeds for x in jobs]

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
    return json.dumps(dict(name=PRESET, benchmark=w.benchmark, seed=int(w.seed), threads=THREADS) | parse_settings(filter(None, setting.split(","))))

wildcard_constraints: benchmark=r"\w+", seed=r"\d+", setting=r"[a-z_]+=[^/]+"

rule all:   # the paper's tables on every benchmark, the rest on the first
    input: [f"{GRAPH}/{b}/{p}.ipynb" for p in [*PAGES, *(m for m in MORE if notebook_of(m) in PAGES)] for b in (BENCHMARKS if p.startswith(("08_ablation", "09")) and p not in MORE else BENCHMARKS[:1])]

rule systems:   # every row of Table 1, for one seed of one benchmark
    input: CODE
    output: touch(f"{GRAPH}/{{benchmark}}/seed{{seed}}/systems")
    params: cfg=told
    threads: THREADS
    shell: "{PYTHON} -c {JOB:q} {params.cfg:q}"

rule setting:   # one setting of Tables 3 and 4; what it shares with the systems is there already
    input: CODE, f"{GRAPH}/{{benchmark}}/seed{{seed}}/systems"
    output: touch(f"{GRAPH}/{{benchmark}}/seed{{seed}}/{{setting}}")
    params: cfg=lambda w: told(w, w.setting)
    threads: THREADS
    shell: "{PYTHON} -c {JOB:q} {params.cfg:q} eval_stage2"

rule progress:   # the same, evaluated while it trained
    input: CODE, f"{GRAPH}/{{benchmark}}/seed{{seed}}/systems"
    output: touch(f"{GRAPH}/{{benchmark}}/seed{{seed}}/progress/{{setting}}")
    params: cfg=lambda w: told(w, w.setting)
    threads: THREADS
    shell: "{PYTHON} -c {JOB:q} {params.cfg:q} progress_stage1 progress_stage2"

rule page:
    input: CODE, lambda w: runs_of(w.page, w.benchmark), notebook=lambda w: f"nbs/{notebook_of(w.page)}.ipynb"
    output: f"{GRAPH}/{{benchmark}}/{{page,[0-9][^/]*}}.ipynb"
    params: given=lambda w: json.dumps(given(w.page, w.benchmark))
    threads: DEFAULT.threads
    shell: "{PYTHON} -m papermill {input.notebook} {output} -y {params.given:q} --no-progress-bar"
