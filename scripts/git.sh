#!/bin/sh
# What `make setup` tells git and DVC: hooks and the merge driver for notebooks, in .gitconfig; that dvc.lock is of this clone;
# and that there is no git, where the project was downloaded as an archive (also into a folder of somebody's repository).
# Git once tracked dvc.lock and was told not to look (skip-worktree), and then refused to pull without a way out.
if [ ! -e .git ]; then
    dvc config --quiet --local core.no_scm true
    exit
fi
grep -qs no_scm .dvc/config.local && dvc config --quiet --local --unset core.no_scm
git config include.path ../.gitconfig
case $(git ls-files -v dvc.lock) in
    S*|s*)
        mv dvc.lock dvc.lock.own && git update-index --no-skip-worktree dvc.lock && git checkout --quiet -- dvc.lock
        echo "git will no longer track dvc.lock: 'git pull', then 'make setup' again; this clone's is in dvc.lock.own until then";;
    '')
        if [ -f dvc.lock.own ] && [ ! -e dvc.lock ]; then mv dvc.lock.own dvc.lock; fi;;
esac
