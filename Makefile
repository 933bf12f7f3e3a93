# Everything runs in .venv, which `make setup` builds by itself: nothing outside this folder is written.
PYTHON ?= python3
RUN = .venv/bin/python

# So many processes share the tests, each with one thread of PyTorch's: these sizes gain nothing from more and lose much on busy cores. `make test` shares
# whole files, for their servers and models serve all tests of a file; tests/conftest.py puts those first that take longest.
JOBS ?= 2
TEST = OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS)
# Where Python has torch already and no package registry is reached: make gpu GPU_PYTHON=python3
GPU_PYTHON ?= $(RUN)
# What happens in which step of `make gpu-rehearsal`.
ACCIDENTS ?= speed Mochi 22k=hang,ptx sm_86=crash,speed Wan 14B 75k=fault,2^31=memory,ptx sm_80=wrong

.PHONY: help setup test test-install soak test-ptx proof demo serve gpu gpu-carry gpu-rehearsal bench bench-models bench-torch bench-monitor clean

help:
	@echo "make demo         sample a tiny video model dense and sparse in a real ComfyUI, print the comparison, save the pictures"
	@echo "make serve        the same server left open in the browser, with the workflow loaded"
	@echo "make test         every test but those of test-ptx and test-install, and the linter"
	@echo "make test-install  the pack through comfy-cli and ComfyUI-Manager, which are installed from PyPI for that"
	@echo "make soak         two clients queue mixed graphs of tiny models in a real ComfyUI for ten minutes, every count checked; MINUTES=60, SEED=1"
	@echo "make test-ptx     every packaged kernel as the compiler's PTX, run on this CPU"
	@echo "make proof        every interleaving of the protocol of Hopper's kernel, however it may be built; takes long"
	@echo "make gpu          the first ten minutes on an NVIDIA GPU: is every kernel right, how fast, what to change next; goes on where it ended"
	@echo "make gpu-carry    what another machine needs for that (.gpu), listed with its size; make gpu-rehearsal runs it on an emulated GPU"
	@echo "make bench        the cuda backend on this NVIDIA GPU: checked, then timed against PyTorch and every installed peer; SHORT=1 takes a minute,"
	@echo "                  ACTIVATIONS=file.safetensors times the q, k, v in a file; without a GPU: what a call costs on the host"
	@echo "make bench-models whole Wan, HunyuanVideo, Mochi and Flux with random weights on this GPU, dense and sparse; MODELS=wan14b,flux picks some"
	@echo "make bench-torch  the torch backend against PyTorch's dense attention on this CPU"
	@echo "make bench-monitor  what the node Sparge Monitor costs per sampling step, on this CPU"
	@echo "make clean        remove what the others made"
	@echo "PYTHON=python3.12 picks the interpreter, COMFYUI_PATH=/path/to/ComfyUI another ComfyUI"

setup:
	@$(PYTHON) tools/comfyui/install.py

test: setup
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(TEST) --dist loadfile --no-loadscope-reorder

test-install: setup
	@$(RUN) -m pytest -m tools tests/install

soak: setup
	@$(RUN) tools/comfyui/soak.py $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED))

test-ptx: setup
	@$(TEST) -m ptx_all tests/ptx

proof: setup
	@$(RUN) tools/ring/prove.py --jobs $(JOBS)

demo: setup
	@$(RUN) tools/comfyui/demo.py

serve: setup
	@$(RUN) tools/comfyui/serve.py

gpu: $(if $(filter $(RUN),$(GPU_PYTHON)),setup)
	@$(GPU_PYTHON) bench/bench_gpu.py $(if $(ONLY),--only "$(ONLY)") $(if $(AGAIN),--again) $(if $(RESULTS),--results "$(RESULTS)")

gpu-carry: setup
	@$(RUN) bench/bench_gpu.py --carry

gpu-rehearsal: setup
	@$(RUN) bench/bench_gpu.py --results demo_output --again --rehearse "$(ACCIDENTS)" || true

bench: setup
	@$(RUN) bench/bench.py $(if $(SHORT),--short) $(if $(ACTIVATIONS),--activations "$(ACTIVATIONS)")

bench-models: setup
	@$(RUN) bench/bench_models.py $(if $(MODELS),--models "$(MODELS)")

bench-torch: setup
	@$(RUN) bench/bench_torch.py

bench-monitor: setup
	@$(RUN) bench/bench_monitor.py

clean:
	rm -rf .venv .comfyui .emulator .gpu demo_output build *.egg-info
