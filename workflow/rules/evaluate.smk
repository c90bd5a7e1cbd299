# Held-out measurements of one run.


rule evaluate:
    input:
        answers_files,
        run=RUN / "{stage}" / "{arm}{variant}" / "seed-{seed}" / "provenance.json",
    output:
        RUN / "{stage}" / "{arm}{variant}" / "seed-{seed}" / "metrics.json",
        RUN / "{stage}" / "{arm}{variant}" / "seed-{seed}" / "examples.parquet",
        RUN / "{stage}" / "{arm}{variant}" / "seed-{seed}" / "evaluation.json",
        RUN / "{stage}" / "{arm}{variant}" / "seed-{seed}" / "evaluation_cost.json",
    log:
        LOGS / "evaluate" / "{stage}" / "{arm}{variant}" / "seed-{seed}.log",
    conda:
        ENVIRONMENT
    params:
        evaluation=evaluation_of,
        # the cache is nothing that an outcome depends on, so it stands in what is not compared
        run=lambda wildcards, input: f"{Path(input.run).parent}{CACHE}",
        # a run's own word on this counts for nothing
        trust=" --trust-remote-code" if study.model.get("trust_remote_code") else "",
    shell:
        "python -m discobeta evaluate {params.run}{params.trust} --set {params.evaluation[settings]} &> {log}"
