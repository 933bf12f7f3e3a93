"""ComfyUI's entry into the pack; `pip install .` installs `kernels/` as `sparge_kernels` and never reads this file."""

if __package__:  # pytest imports this folder without a package name, for its own bookkeeping
    WEB_DIRECTORY = "./web"

    async def comfy_entrypoint():
        from .nodes import extension

        return extension()
