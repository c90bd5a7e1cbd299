# One job per run. Only provenance.json is declared: it is written last, and Snakemake deletes what
# is declared before a retry, so the checkpoints stay and the job resumes from them.


rule train_rm:
    input:
        modules("rm"),
        BASE,
        shared_files("rm"),
    output:
        RUN / "rm" / "{arm}" / "seed-{seed}{proof}" / "provenance.json",
    log:
        LOGS / "rm" / "{arm}" / "seed-{seed}{proof}.log",
    conda:
        ENVIRONMENT
    params:
        settings=run_settings("rm"),
        processes=PROCESSES,
    shell:
        "printf %s {params.settings:q} | python -m discobeta train - --no-evaluate{params.processes} &> {log}"


use rule train_rm as train_dpo with:
    input:
        modules("dpo"),
        BASE,
        shared_files("dpo"),
    output:
        RUN / "dpo" / "{arm}" / "seed-{seed}{proof}" / "provenance.json",
    log:
        LOGS / "dpo" / "{arm}" / "seed-{seed}{proof}.log",
    params:
        settings=run_settings("dpo"),
        processes=PROCESSES,


use rule train_rm as train_ppo with:
    input:
        modules("ppo"),
        BASE,
        shared_files("ppo"),
    output:
        RUN / "ppo" / "{arm}" / "seed-{seed}{proof}" / "provenance.json",
    log:
        LOGS / "ppo" / "{arm}" / "seed-{seed}{proof}.log",
    params:
        settings=run_settings("ppo"),
        processes=PROCESSES,
