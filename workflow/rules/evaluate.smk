# Held-out measurements of one run.


rule evaluate:
    input:
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
        code=lambda wildcards: code("evaluate", wildcards.stage),
        settings=evaluation_words,
        directory=lambda wildcards, input: Path(input.run).parent,
        # a run's own word on these counts for nothing
        trust=" --trust-remote-code" if study.model.get("trust_remote_code") else "",
        cache=lambda wildcards, threads: (
            f" --cache-dir {shlex.quote(cache)}" if (cache := study.model.get("cache_dir")) else ""
        ),
    shell:
        "python -m discobeta evaluate {params.directory} --set {params.settings}{params.trust}{params.cache} &> {log}"
