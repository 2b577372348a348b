# GPUBROKER: everything that is done with it. `make` alone lists the targets.
# All that is needed is Linux, make, and Python 3.11 or later; the rest is installed into .venv.

PIN_UV := 0.13.9
VENV   := .venv
BIN    := $(VENV)/bin
export UV_SYSTEM_CERTS := 1
export UV_PYTHON_DOWNLOADS := never

.DEFAULT_GOAL := help
.PHONY: help demo test check run bench lock manifests format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/run.stamp ## set up from a bare clone and play an agent's whole session
	@$(BIN)/python -m gpubroker.local.demo

test: $(VENV)/test.stamp ## set up and run all tests
	@$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

run: $(VENV)/run.stamp ## serve the whole broker on this machine, data in .gpubroker
	@$(BIN)/gpubroker dev $(ARGS)

bench: $(VENV)/test.stamp ## measure speed beside a hello's: a table, and bench.json (under 4 minutes)
	@$(BIN)/python -m tests.bench $(ARGS)

check: $(VENV)/test.stamp ## lint, types, import contracts, generated files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports
	$(BIN)/gpubroker manifests render --check

manifests: $(VENV)/run.stamp ## make eventing/ and knative/ anew from the code
	$(BIN)/gpubroker manifests render

format: $(VENV)/test.stamp ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(VENV)/uv.stamp ## resolve the dependencies anew
	$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --upgrade \
		--extra local --extra build pyproject.toml -o requirements.lock
	$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --upgrade -c requirements.lock \
		--extra local --extra build --extra test pyproject.toml -o requirements-test.lock
	$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --upgrade -c requirements-test.lock \
		--extra kubernetes pyproject.toml -o requirements-image.lock

clean: ## remove what was installed (not .gpubroker: that is your data)
	rm -rf $(VENV) dist

# The first Python on the PATH that is new enough.
$(VENV)/uv.stamp:
	@for python in python3.13 python3.12 python3.11 python3 python; do \
		if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			$$python -m venv $(VENV) && exit; \
			echo "gpubroker: $$python cannot make a virtual environment; install its venv module" >&2; exit 1; \
		fi; \
	done; echo "gpubroker needs Python 3.11 or later on the PATH; there is $$(python3 --version 2>/dev/null || echo none)" >&2; exit 1
	@$(BIN)/python -m pip install -q --disable-pip-version-check uv==$(PIN_UV) || echo "no uv here, pip does it, more slowly" >&2
	@touch $@

# With uv in seconds; on any failure of it the same file through pip.
define install
	@{ $(BIN)/uv pip install -q --python $(BIN)/python --require-hashes -r $(1) 2>/dev/null \
		&& $(BIN)/uv pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e . 2>/dev/null; } \
	|| { $(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r $(1) \
		&& $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .; }
endef

$(VENV)/run.stamp: $(VENV)/uv.stamp requirements.lock pyproject.toml
	$(call install,requirements.lock)
	@touch $@

$(VENV)/test.stamp: $(VENV)/run.stamp requirements-test.lock
	$(call install,requirements-test.lock)
	@touch $@
