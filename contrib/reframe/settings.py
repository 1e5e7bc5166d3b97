"""ReFrame's site configuration for one machine with mpirun; your site has its own, with its Slurm partitions."""

site_configuration = {
    "systems": [
        {
            "name": "here",
            "hostnames": [".*"],
            "partitions": [
                {"name": "local", "scheduler": "local", "launcher": "mpirun", "environs": ["builtin"], "max_jobs": 1}
            ],
        }
    ],
    "environments": [{"name": "builtin", "target_systems": ["here"]}],
}
