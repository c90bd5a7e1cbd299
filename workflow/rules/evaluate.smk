# Held-out measurements of one run.


rule evaluate:
    input:
        modules("evaluate"),
        run=RUN / "{stage}" / "{arm}" / "seed-{seed}" / "provenance.json",
    output:
        RUN / "{stage}" / "{arm}" / "seed-{seed}" / "metrics.json",
        RUN / "{stage}" / "{arm}" / "seed-{seed}" / "examples.parquet",
    log:
        LOGS / "evaluate" / "{stage}" / "{arm}" / "seed-{seed}.log",
    conda:
        ENVIRONMENT
    params:
        directory=lambda wildcards, input: Path(input.run).parent,
    shell:
        "python -m discobeta evaluate {params.directory} &> {log}"
