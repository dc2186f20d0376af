# Made from the table of options by `cargo xtask generate`.
_crtools() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]}
    [[ $word == = ]] && word=
    [[ $before == = ]] && before=${COMP_WORDS[COMP_CWORD-2]}
    case $before in
        -t|--tree) mapfile -t COMPREPLY < <(compgen -W "$(cd /proc && echo [0-9]*)" -- "$word"); return ;;
        -D|--images-dir) mapfile -t COMPREPLY < <(compgen -d -- "$word"); return ;;
        -W|--work-dir) mapfile -t COMPREPLY < <(compgen -d -- "$word"); return ;;
        --prev-images-dir) mapfile -t COMPREPLY < <(compgen -d -- "$word"); return ;;
        --pidfile) mapfile -t COMPREPLY < <(compgen -f -- "$word"); return ;;
        -o|--log-file) mapfile -t COMPREPLY < <(compgen -f -- "$word"); return ;;
        --verbosity) mapfile -t COMPREPLY < <(compgen -W "0 1 2 3 4" -- "$word"); return ;;
        --config) mapfile -t COMPREPLY < <(compgen -f -- "$word"); return ;;
        --progress) mapfile -t COMPREPLY < <(compgen -W "auto always never" -- "$word"); return ;;
        -r|--root) mapfile -t COMPREPLY < <(compgen -f -- "$word"); return ;;
        --irmap-scan-path) mapfile -t COMPREPLY < <(compgen -f -- "$word"); return ;;
        --file-validation) mapfile -t COMPREPLY < <(compgen -W "filesize buildid" -- "$word"); return ;;
        --network-lock) mapfile -t COMPREPLY < <(compgen -W "iptables nftables skip none" -- "$word"); return ;;
        --manage-cgroups) mapfile -t COMPREPLY < <(compgen -W "ignore none" -- "$word"); return ;;
        --tls-cacert) mapfile -t COMPREPLY < <(compgen -f -- "$word"); return ;;
        --tls-cacrl) mapfile -t COMPREPLY < <(compgen -f -- "$word"); return ;;
        --tls-cert) mapfile -t COMPREPLY < <(compgen -f -- "$word"); return ;;
        --tls-key) mapfile -t COMPREPLY < <(compgen -f -- "$word"); return ;;
        --feature) mapfile -t COMPREPLY < <(compgen -W "mnt_id mem_dirty_track aio_remap timerfd tun tun_ns userns fdinfo_lock seccomp_suspend seccomp_filters loginuid cgroupns autofs tcp_half_closed compat_cr uffd uffd-noncoop can_map_vdso sk_ns sk_unix_file net_diag_raw nsid link_nsid kcmp_epoll timens external_net_ns clone3_set_tid newifindex nftables has_ipt_legacy pidfd_store ns_pid apparmor_stacking network_lock_nftables sockopt_buf_lock memfd_hugetlb move_mount_set_group openat2 get_rseq_conf ipv6_freebind pagemap_scan timer_cr_ids overlayfs_maps breakpoints pagemap_scan_guard_pages" -- "$word"); return ;;
    esac
    local options="--help --version --tree --images-dir --work-dir --daemon --restore-detached --no-restore-detached --restore-sibling --no-restore-sibling --leave-stopped --leave-running --prev-images-dir --pidfile --log-file --verbosity --config --no-default-config --close --action-script --display-stats --no-display-stats --deprecated --no-deprecated --timeout --cpu-cap --dry-run --copy-on-write --no-copy-on-write --pre-copy --no-pre-copy --compress --share-pages --no-share-pages --secret-memory --record-working-set --progress --root --external --inherit-fd --link-remap --no-link-remap --ghost-limit --ghost-fiemap --no-ghost-fiemap --force-irmap --no-force-irmap --irmap-scan-path --file-locks --no-file-locks --file-validation --skip-file-rwx-check --no-skip-file-rwx-check --ext-unix-sk --network-lock --manage-cgroups --track-mem --no-track-mem --auto-dedup --no-auto-dedup --pre-dump-mode --lazy-pages --page-server --no-page-server --address --port --ps-socket --status-fd --tls --no-tls --tls-cacert --tls-cacrl --tls-cert --tls-key --tls-no-cn-verify --shell-job --no-shell-job --extra --no-extra --experimental --no-experimental --all --feature"
    local commands="dump pre-dump restore check page-server lazy-pages dedup"
    [[ $word == -* ]] || options=$commands
    mapfile -t COMPREPLY < <(compgen -W "$options" -- "$word")
}
complete -F _crtools crtools
