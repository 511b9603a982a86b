# From a bare Debian 12 (git and make) to a running plugin, and to a tested one.
# Debian's packages are looked for first, so that a second run needs neither apt nor root.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.NOTPARALLEL:

# Debian's own interpreter: another python3 on the path may have no headers.
PYTHON := /usr/bin/python3
VENV := .venv
VENV_DEBIAN := .venv-debian12
VENV_TOOLS := .venv-tools
# With nothing in it but volplugin and what it needs, as locked: what the SBOM lists.
VENV_LOCKED := .venv-locked

RUN_PACKAGES := gcc libc6-dev python3-dev python3-venv
# A whole cluster, Ceph's Python bindings, and what maps its images and mounts its files.
CEPH_PACKAGES := ceph-common ceph-fuse ceph-mds ceph-mgr ceph-mon ceph-osd fuse3 python3-cephfs python3-rados \
	python3-rbd qemu-block-extra qemu-system-common rbd-nbd
# What builds Debian's package and looks at it.
DEB_PACKAGES := build-essential debhelper dh-python fakeroot lintian python3-all python3-setuptools
PLUGIN_PACKAGES := mmdebstrap
TEST_PACKAGES := $(RUN_PACKAGES) $(CEPH_PACKAGES) $(DEB_PACKAGES) $(PLUGIN_PACKAGES) btrfs-progs busybox-static \
	debootstrap docker-compose docker-registry docker.io e2fsprogs iproute2 kmod man-db mount openssl podman \
	postgresql procps rclone systemd user-mode-linux util-linux xfsprogs
BENCH_PACKAGES := $(RUN_PACKAGES) $(CEPH_PACKAGES) btrfs-progs busybox-static docker.io e2fsprogs fio fuse3 kmod \
	mount rclone user-mode-linux util-linux xfsprogs

LOCK := packaging/requirements.lock

ARGS ?=
PLUGIN ?= build/plugin
CEPH ?= no
LOCKED ?= no
PYTEST_ARGS ?=
TESTS ?= tests
# What depends on a library's version (records, attributes, LevelDB, HTTP); the kernel,
# the engines and the crashes need no second run.
TESTS_DEBIAN ?= tests/unit tests/protocol tests/contract/test_store_contract.py tests/contract/test_store_database.py \
	tests/contract/test_drivers_conformance.py

# $(call install,PACKAGES): install those that are not there. On a host with systemd,
# docker.io and docker-registry start theirs, as they always do; no test uses those.
define install
@missing=; for package in $(1); do \
	test "$$(dpkg-query -W -f '$${db:Status-Status}' $$package 2>/dev/null)" = installed \
		|| missing="$$missing $$package"; \
done; \
test -n "$$missing" || exit 0; \
test "$$(id -u)" = 0 || { echo "make $@: run it as root to install:$$missing" >&2; exit 1; }; \
echo "installing:$$missing"; \
export DEBIAN_FRONTEND=noninteractive; \
apt-get update -qq && apt-get install -qqy --no-install-recommends $$missing >/dev/null
endef

.PHONY: help
help: ## list what can be made
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' Makefile | expand -t 16

.PHONY: run
run: $(VENV)/.installed ## install the plugin into .venv and serve (ARGS="--root DIR -v")
	@test "$$(id -u)" = 0 || { echo "make run: volplugin mounts file systems; run it as root" >&2; exit 1; }
	@exec $(VENV)/bin/volplugin serve $(ARGS)

# Each file of tests/ceph in a process of its own: what a test leaves of a hung client's
# threads is no other file's trouble.
.PHONY: test
test: packages-test lint ## lint and test, with current libraries and with Debian 12's (TESTS=, PYTEST_ARGS=)
ifeq ($(TESTS),tests)
	$(VENV)/bin/python -m pytest --ignore=tests/ceph tests $(PYTEST_ARGS)
	@for file in tests/ceph/test_*.py; do \
		$(VENV)/bin/python -m pytest $$file $(PYTEST_ARGS) || exit; \
	done
else
	$(VENV)/bin/python -m pytest $(TESTS) $(PYTEST_ARGS)
endif
	@$(MAKE) --no-print-directory test-debian12

.PHONY: test-debian12
test-debian12: packages-test $(VENV_DEBIAN)/.installed ## test with Debian 12's libraries alone (TESTS_DEBIAN=, PYTEST_ARGS=)
	$(VENV_DEBIAN)/bin/python -m pytest $(TESTS_DEBIAN) $(PYTEST_ARGS)

.PHONY: lint
lint: $(VENV)/.installed-test ## check form, types and layers
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

.PHONY: format
format: $(VENV)/.installed-test ## format, and mend what ruff can
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

# What dockerd and podman send, for tests/protocol, recorded anew.
.PHONY: recordings
recordings: packages-test $(VENV)/.installed-test
	@cd tests && exec ../$(VENV)/bin/python -m support.record_engines

.PHONY: bench
bench: packages-bench $(VENV)/.installed-test ## measure beside rclone and Docker's local driver (ARGS="--quick --write")
	@exec $(VENV)/bin/python -m benchmarks.bench $(ARGS)

.PHONY: manual
manual: $(VENV)/.installed-test ## write man page and shell completions from the help
	$(VENV)/bin/python packaging/manual.py

.PHONY: dist
dist: $(VENV)/.installed-test ## build sdist and wheel into dist
	$(VENV)/bin/python -m build --outdir dist .

# The tree as it is, changed or not, is what is built; dpkg wants debian/ at its top.
.PHONY: deb
deb: packages-deb ## build Debian's package into dist, and look at it with lintian
	packaging/deb

# Of all systems and all wheels; taken anew, for a lock is to be had up to date.
.PHONY: lock
lock: $(VENV_TOOLS)/.installed ## pin and hash what volplugin needs, as of today
	CUSTOM_COMPILE_COMMAND="make lock" $(VENV_TOOLS)/bin/pip-compile --quiet --upgrade --generate-hashes \
		--strip-extras --allow-unsafe --no-emit-index-url --no-emit-trusted-host --no-emit-find-links \
		--no-emit-options --output-file $(LOCK) setup.cfg

.PHONY: sbom
sbom: dist ## write the list of what is shipped: dist/volplugin.cdx.json
	rm -rf $(VENV_LOCKED)
	$(PYTHON) -m venv --without-pip $(VENV_LOCKED)
	$(VENV)/bin/pip --python $(VENV_LOCKED)/bin/python install -q --require-hashes -r $(LOCK)
	$(VENV)/bin/pip --python $(VENV_LOCKED)/bin/python install -q --no-deps --no-index --find-links dist volplugin
	@mkdir -p dist
	PATH=$(VENV)/bin:$$PATH packaging/sbom $(VENV_LOCKED) dist/volplugin.cdx.json
	rm -rf $(VENV_LOCKED)

.PHONY: plugin
plugin: packages-plugin ## assemble the managed plugin for docker plugin create (PLUGIN=DIR, CEPH=yes, LOCKED=yes)
	@test "$$(id -u)" = 0 || { echo "make plugin: its files are root's; run it as root" >&2; exit 1; }
	@CEPH=$(CEPH) LOCKED=$(LOCKED) packaging/plugin/assemble $(PLUGIN)

# Of both images: that with Ceph has all packages of the other.
.PHONY: plugin-lock
plugin-lock: packages-plugin ## note the packages of today's managed plugin, with hashes
	@CEPH=yes packaging/plugin/assemble build/plugin-lock
	@cp build/plugin-lock/rootfs/usr/share/volplugin/packages packaging/plugin/packages.lock
	@rm -rf build/plugin-lock

.PHONY: clean
clean: ## remove what was made here; volumes stay
	rm -rf $(VENV) $(VENV_DEBIAN) $(VENV_TOOLS) $(VENV_LOCKED) build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

.PHONY: packages-run packages-plugin packages-test packages-bench packages-deb
packages-run:
	$(call install,$(RUN_PACKAGES))
packages-plugin:
	$(call install,$(PLUGIN_PACKAGES))
packages-test:
	$(call install,$(TEST_PACKAGES))
packages-bench:
	$(call install,$(BENCH_PACKAGES))
packages-deb:
	$(call install,$(DEB_PACKAGES))

# Editable: the clone is what runs. A change of setup.cfg installs again. wheel is what
# Debian's pip builds pyxattr with, which comes as source.
$(VENV)/.installed: setup.cfg setup.py | packages-run
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q wheel
	$(VENV)/bin/pip install -q -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(VENV)/bin/pip install -q -e '.[test]'
	@touch $@

$(VENV_DEBIAN)/.installed: setup.cfg setup.py tests/constraints-debian12.txt | packages-run
	$(PYTHON) -m venv $(VENV_DEBIAN)
	$(VENV_DEBIAN)/bin/pip install -q wheel
	$(VENV_DEBIAN)/bin/pip install -q -c tests/constraints-debian12.txt -e '.[test]'
	@touch $@

$(VENV_TOOLS)/.installed: | packages-run
	$(PYTHON) -m venv $(VENV_TOOLS)
	$(VENV_TOOLS)/bin/pip install -q pip-tools
	@touch $@
