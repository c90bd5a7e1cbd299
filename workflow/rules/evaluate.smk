# Held-out measurements of one run.


rule evaluate:
    input:
        modules("evaluate"),
        run=RUN / "{stage}" / "{arm}" / "seed-{seed}" / "provenance.json",
    output:
        RUN / "{stage}" / "{arm}" / "seed-{seed}" / "metrics.json",
        RUN / "{stage}" / "{arm}" / "seed-{seed}" / "examples.parquet",
        RUN / "{stage}" / "{arm}" / "seed-{seed}" / "evaluation.json",
        RUN / "{stage}" / "{arm}" / "seed-{seed}" / "evaluation_cost.json",
    log:
        LOGS / "evaluate" / "{stage}" / "{arm}" / "seed-{seed}.log",
    conda:
        ENVIRONMENT
    params:
        directory=lambda wildcards, input: Path(input.run).parent,
        # a run's own word on these counts for nothing
        trust=" --trust-remote-code" if study.model.get("trust_remote_code") else "",
        cache=f" --cache-dir {shlex.quote(cache)}" if (cache := study.model.get("cache_dir")) else "",
    shell:
        "python -m discobeta evaluate {params.directory}{params.trust}{params.cache} &> {log}"
