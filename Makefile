# The team's verbs. `make` alone lists them.
# Needs neither root nor git; what it cannot install it names.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

BIN := .venv/bin
# Two a core: a test waits for disks, deadlines and other processes about as long as it computes.
WORKERS ?= $(shell echo $$((2 * $$(nproc))))
# More words for the tool behind a verb: make test ARGS='-k idempotency'
ARGS ?=
# A path to write a JUnit report to (CI adds them up).
JUNIT ?=
PYTEST := $(BIN)/python -m pytest $(if $(JUNIT),--junitxml=$(JUNIT))
PIP_FLAGS := --quiet --disable-pip-version-check
KMS := $(BIN)/progressdb-kms

.PHONY: help
help: ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 24

# Without --no-deps pip asks the index for a requirement with an extra (coverage[toml]), takes its newest release
# and refuses that for want of a hash: each release of such a package would break an install from these locks.
.PHONY: install
install: .venv/.installed ## build .venv from the locks; again only when a lock or pyproject.toml changed

.venv/.installed: requirements/dev.txt pyproject.toml
	test -x $(BIN)/python || "$$(scripts/find-python)" -m venv .venv
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps --require-hashes -r requirements/dev.txt
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps --no-build-isolation -e .
	$(BIN)/python -m pip check --quiet
	touch $@

.PHONY: system-packages
system-packages:
	@scripts/system-packages

.PHONY: run
run: install system-packages ## serve from .dev over mTLS, show a round trip, until Ctrl-C
	$(KMS) dev --dir .dev --demo $(ARGS)

.PHONY: test
test: install system-packages ## every test but those of wheel, image, chart and cluster (COVERAGE=1 measures branches)
	$(PYTEST) -n $(WORKERS) --dist loadscope --no-loadscope-reorder -m 'not wheel and not image and not cluster and not chart' $(if $(COVERAGE),--cov --cov-report=term) $(ARGS)

.PHONY: test-fault
test-fault: export FAULT_RUNS ?= 200
test-fault: install system-packages ## the fault tests in long form (FAULT_RUNS times each)
	$(PYTEST) tests/fault --timeout=0 $(ARGS)

# Seconds that each target of the fuzzer gets; 0 leaves it out.
FUZZ_SECONDS ?= 60
FUZZ_TARGETS ?= blob policy config kek export records audit http ordinary batch
.PHONY: fuzz
fuzz: export HYPOTHESIS_PROFILE := fuzz
fuzz: install system-packages ## the property tests with 100 times the examples, then the fuzzer (FUZZ_SECONDS a target)
	$(PYTEST) tests -m fuzz -n $(WORKERS) --timeout=0 $(ARGS)
	test $(FUZZ_SECONDS) -eq 0 || $(MAKE) fuzz-bytes

.PHONY: fuzz-bytes
fuzz-bytes: .venv-fuzz/.installed ## the fuzzer alone, guided by coverage (FUZZ_SECONDS, FUZZ_TARGETS)
	for target in $(FUZZ_TARGETS); do .venv-fuzz/bin/python -m tests.fuzz.run $$target $(FUZZ_SECONDS); done

.venv-fuzz/.installed: requirements/fuzz.txt .venv/.installed
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv-fuzz
	$(BIN)/uv pip install --quiet --python .venv-fuzz/bin/python --no-deps --require-hashes -r requirements/dev.txt -r requirements/fuzz.txt
	$(BIN)/uv pip install --quiet --python .venv-fuzz/bin/python --no-deps --no-build-isolation -e .
	touch $@

.PHONY: test-wheel
test-wheel: install ## build the wheel and test it in fresh environments
	$(PYTEST) tests/packaging -m wheel $(ARGS)

# Another builder's archive is taken as it is: make test-image IMAGE_ARCHIVE=FILE
IMAGE_ARCHIVE ?= dist/image.tar

.PHONY: image
image: ## build the container image into dist/image.tar (docker buildx or buildah)
	scripts/image --archive dist/image.tar $(ARGS)

dist/image.tar:
	$(MAKE) image

# On an image of the service that the builder already has: BASE=name:tag
BASE ?= progressdb-kms:dev
.PHONY: image-chat
image-chat: ## build the image chat-server:dev of examples/chat_server (docker or buildah; BASE=name:tag)
	if docker info > /dev/null 2>&1; then builder=docker; else builder=buildah; fi; \
	"$$builder" build --file deploy/examples/chat-server/Dockerfile --build-arg BASE=$(BASE) --tag chat-server:dev \
		$(ARGS) examples

.PHONY: test-image
test-image: export IMAGE_ARCHIVE := $(IMAGE_ARCHIVE)
test-image: install system-packages $(IMAGE_ARCHIVE) ## check the image and serve from it, as root
	$(PYTEST) tests/image -m image --timeout=0 $(ARGS)

# The quick unit tests on another Python: make test-3.12, make test-3.13
test-3.%: .venv-3.%/.installed
	.venv-3.$*/bin/python -m pytest $(if $(JUNIT),--junitxml=$(JUNIT)) tests/unit -m 'not slow' -n $(WORKERS) $(ARGS)

# By uv, which takes seconds where pip takes a minute; hashes are checked all the same.
.PRECIOUS: .venv-3.%/.installed
.venv-3.%/.installed: .venv/.installed
	$(BIN)/uv venv --quiet --clear --python "$$(scripts/find-python 3.$*)" .venv-3.$*
	$(BIN)/uv pip install --quiet --python .venv-3.$*/bin/python --no-deps --require-hashes -r requirements/dev.txt
	$(BIN)/uv pip install --quiet --python .venv-3.$*/bin/python --no-deps --no-build-isolation -e .
	touch $@

.PHONY: model
model: system-packages ## check the model of KEK rotation, and that it fails where it must
	docs/model/run.sh

# One target each, so that `make -k lint` shows all that is wrong.
LINTS := lint-rules lint-format lint-types lint-imports lint-locks
.PHONY: lint $(LINTS)
lint: $(LINTS) ## ruff, formatting, types, import directions, locks
$(LINTS): install
lint-rules:
	$(BIN)/ruff check .
lint-format:
	$(BIN)/ruff format --check .
lint-types:
	$(BIN)/mypy
lint-imports:
	$(BIN)/lint-imports --no-logo
lint-locks:
	$(BIN)/python scripts/check_locks.py

.PHONY: format
format: install ## let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: lock
lock: ## write the locks from pyproject.toml (ARGS=--upgrade for newer versions)
	test -x $(BIN)/uv || $(MAKE) install
	UV=$(BIN)/uv scripts/lock $(ARGS)

.PHONY: openapi
openapi: install ## write docs/openapi.json
	$(KMS) openapi > docs/openapi.json.new
	mv docs/openapi.json.new docs/openapi.json

.PHONY: check-openapi
check-openapi: install ## is docs/openapi.json what the service says of itself?
	$(KMS) openapi | diff -u docs/openapi.json -

.PHONY: reference
reference: install ## write the generated parts of docs/ (commands, settings, routes, metrics, errors)
	$(BIN)/python scripts/reference.py

# Builds without the network: nothing in the pages comes from elsewhere, which the check holds it to.
.PHONY: docs
docs: export NO_MKDOCS_2_WARNING := 1
docs: .venv-docs/.installed ## build the documentation site into site/, strictly, without the network
	.venv-docs/bin/mkdocs build --strict --clean
	.venv-docs/bin/python scripts/check_site.py site

.venv-docs/.installed: requirements/docs.txt .venv/.installed
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv-docs
	$(BIN)/uv pip install --quiet --python .venv-docs/bin/python --no-deps --require-hashes -r requirements/docs.txt
	touch $@

.PHONY: screenshots
screenshots: install system-packages ## write docs/images from a real service in Chromium
	SCREENSHOTS=1 $(PYTEST) tests/page/test_browser.py -k rotation $(ARGS)

.venv-audit/.installed: requirements/audit.txt .venv/.installed
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv-audit
	$(BIN)/uv pip install --quiet --python .venv-audit/bin/python --no-deps --require-hashes -r requirements/audit.txt
	touch $@

# --strict: what could not be looked up is not taken for sound.
.PHONY: audit-deps
audit-deps: .venv-audit/.installed ## look the locked packages up among known vulnerabilities (needs the internet)
	.venv-audit/bin/pip-audit --strict --disable-pip --no-deps -r requirements/image.txt -r requirements/client.txt $(ARGS)

.PHONY: sbom
sbom: .venv-audit/.installed ## write dist/progressdb-kms.cdx.json (CycloneDX) of what the service is deployed with
	mkdir -p dist
	.venv-audit/bin/cyclonedx-py requirements requirements/image.txt --pyproject pyproject.toml --mc-type application \
		--output-reproducible --validate --output-format JSON --output-file dist/progressdb-kms.cdx.json
	$(BIN)/python scripts/check_sbom.py dist/progressdb-kms.cdx.json requirements/image.txt

.PHONY: bench
bench: install system-packages ## measure the service beside ceilings of the same machine (15 minutes; benchmarks/README.md)
	$(BIN)/python -m benchmarks.run $(ARGS)

# helm, helm-docs, kubeconform-offline (strict, with local schemas) and kube-score are looked up on PATH; helm alone must be there.
CHART := deploy/helm/progressdb-kms
.PHONY: chart chart-docs test-chart
chart: install ## lint the chart; are its schema and README current, its manifests valid? (needs helm)
	scripts/check_chart

chart-docs: install ## write the chart's values.schema.json and README.md (needs helm-docs)
	$(BIN)/python scripts/chart_schema.py
	helm-docs --chart-search-root $(CHART) --log-level warning

test-chart: install ## the tests of the chart and of the Tiltfile over helm template (needs helm)
	$(PYTEST) tests/chart tests/tilt -n $(WORKERS) --dist loadscope --no-cov $(ARGS)

.PHONY: manifests
manifests: install ## write deploy/k8s from the chart (needs helm)
	$(BIN)/python scripts/manifests.py

.PHONY: check-manifests
check-manifests: install ## is deploy/k8s what the chart renders, and do its overlays build? (needs helm, kubectl)
	$(BIN)/python scripts/manifests.py --check

# Needs KUBECONFIG, and in IMAGE and CHAT_IMAGE the names of images that the nodes have: docs/kubernetes.md.
CHAT_IMAGE ?= chat-server:dev
.PHONY: test-cluster
test-cluster: install ## the chart's life on a real cluster: make test-cluster IMAGE=progressdb-kms:test
	IMAGE="$(IMAGE)" CHAT_IMAGE="$(CHAT_IMAGE)" $(PYTEST) tests/cluster -m cluster --timeout=900 $(ARGS)

# They are in `make test` too; ARGS=--full rotates 100,000 messages and kills the server 50 times meanwhile.
.PHONY: test-examples
test-examples: install system-packages ## the tests of examples/ (ARGS=--full for the long form)
	$(PYTEST) tests/examples tests/recipes $(ARGS)

.PHONY: clean
clean: ## remove caches, reports and builds (.venv and .dev, which holds keys, stay)
	rm -rf build dist site htmlcov .coverage .coverage.* .hypothesis .schemathesis
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .venv-3.* .venv-audit .venv-docs .venv-fuzz
	find service tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
