# One job per run. Only provenance.json is declared: it is written last, and Snakemake deletes what
# is declared before a retry, so the checkpoints stay and the job resumes from them.

for stage in STAGES:

    rule:
        name:
            f"train_{stage}"
        input:
            BASE,
            shared_files(stage),
        output:
            RUN / stage / "{arm}{variant}" / "seed-{seed}{proof}" / "provenance.json",
        log:
            LOGS / stage / "{arm}{variant}" / "seed-{seed}{proof}.log",
        conda:
            ENVIRONMENT
        params:
            code=code("train", stage),
            decides=run_decides(stage),
            settings=run_settings(stage),
            processes=PROCESSES,
        shell:
            "printf %s {params.settings:q} | python -m discobeta train - --no-evaluate{params.processes} &> {log}"
