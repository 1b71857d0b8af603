"""The samplers people know by name, as data: nothing here takes time to import."""

Settings = dict[str, bool | str | None]
Table = dict[str, tuple[str, Settings]]

NATIVE = "Native"  # the pipeline's own scheduler, as loaded
PLAIN_SIGMAS: Settings = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
PLAIN_DPM: Settings = PLAIN_SIGMAS | {
    "thresholding": False,
    "use_lu_lambdas": False,
    "variance_type": None,
    "final_sigmas_type": "zero",
}

PLAIN_DDIM: Settings = {"clip_sample": False, "set_alpha_to_one": False, "thresholding": False}

# As diffusers' schedulers (paper, appendix A.10), for models with a beta schedule such as Stable
# Diffusion.  What another scheduler's config may lack is always set: from_config would take
# defaults that Stable Diffusion does not use.
SAMPLERS: Table = {
    "DDIM": ("DDIMScheduler", PLAIN_DDIM),
    # Its first step is at t = T, where x_T belongs, and not below (Lin et al., 2024): few steps
    # then come nearer to what many give.
    "DDIM (trailing)": ("DDIMScheduler", PLAIN_DDIM | {"timestep_spacing": "trailing"}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", PLAIN_DPM | {"algorithm_type": "dpmsolver++"}),
    "DPM++ SDE": ("DPMSolverMultistepScheduler", PLAIN_DPM | {"algorithm_type": "sde-dpmsolver++"}),
    "Euler": ("EulerDiscreteScheduler", PLAIN_SIGMAS),
    # The paper's "EDM": its second-order Heun solver on Karras sigmas, in 2 N - 1 forwards.
    "Heun (EDM)": ("HeunDiscreteScheduler", PLAIN_SIGMAS | {"use_karras_sigmas": True}),
}

# For flow matching, beside the pipeline's own.
FLOW_SAMPLERS: Table = {
    "Euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "Heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "DPM++ 2M": (
        "DPMSolverMultistepScheduler",
        {
            "algorithm_type": "dpmsolver++",
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
        },
    ),
    "UniPC": (
        "UniPCMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
    ),
}

SAMPLER_NAMES = [NATIVE, *dict.fromkeys([*SAMPLERS, *FLOW_SAMPLERS])]
