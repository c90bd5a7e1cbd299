# One job per run. Only provenance.json is declared: it is written last, and Snakemake deletes what
# is declared before a retry, so the checkpoints stay and the job resumes from them.


rule train_rm:
    input:
        BASE,
        shared_files("rm"),
    output:
        RUN / "rm" / "{arm}" / "seed-{seed}{proof}" / "provenance.json",
    log:
        LOGS / "rm" / "{arm}" / "seed-{seed}{proof}.log",
    conda:
        ENVIRONMENT
    params:
        code=code("train", "rm"),
        decides=run_decides("rm"),
        settings=run_settings("rm"),
        processes=PROCESSES,
    shell:
        "printf %s {params.settings:q} | python -m discobeta train - --no-evaluate{params.processes} &> {log}"


use rule train_rm as train_dpo with:
    input:
        BASE,
        shared_files("dpo"),
    output:
        RUN / "dpo" / "{arm}" / "seed-{seed}{proof}" / "provenance.json",
    log:
        LOGS / "dpo" / "{arm}" / "seed-{seed}{proof}.log",
    params:
        code=code("train", "dpo"),
        decides=run_decides("dpo"),
        settings=run_settings("dpo"),
        processes=PROCESSES,


use rule train_rm as train_ppo with:
    input:
        BASE,
        shared_files("ppo"),
    output:
        RUN / "ppo" / "{arm}" / "seed-{seed}{proof}" / "provenance.json",
    log:
        LOGS / "ppo" / "{arm}" / "seed-{seed}{proof}.log",
    params:
        code=code("train", "ppo"),
        decides=run_decides("ppo"),
        settings=run_settings("ppo"),
        processes=PROCESSES,
