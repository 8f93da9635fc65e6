// Package policy is IMA's rule language: Parse, String, Match. It is pure: no I/O, any OS.
//
// # The language
//
// A policy is text, one rule a line. An empty line, and one whose first character (spaces and tabs aside) is "#", is no
// rule; nothing else is a comment. A rule is an action, then conditions and options, all separated by spaces or tabs:
//
//	action     measure dont_measure appraise dont_appraise audit dont_audit hash dont_hash
//	condition  func= mask= fsmagic= fsname= fs_subtype= fsuuid= keyrings= label=
//	           uid euid gid egid fowner fgroup, each with =, < or > and a decimal number
//	           obj_user= obj_role= obj_type= subj_user= subj_role= subj_type=
//	option     pcr= template= digest_type= appraise_type= appraise_flag= appraise_algos= permit_directio
//
// A condition that is absent matches anything. mask=MAY_READ matches an event that asks for reading and nothing else,
// mask=^MAY_READ one that asks for reading among others. Two conditions need order: template= comes after measure, and
// appraise_type=sigv3 belongs to digest_type=verity.
//
// For an event the rules are tried in order. The first that matches decides about its kind of action (measure or
// dont_measure, appraise or dont_appraise, and so on), later rules only about the kinds still open. So one event can
// be measured by one rule and audited by another, and a dont_ rule only works above the rule that it takes from.
//
// An example: nothing from tmpfs, else all that runs; what root reads goes to PCR 11, unless it is a log.
//
//	dont_measure fsmagic=0x1021994
//	dont_measure func=FILE_CHECK obj_type=var_log_t
//	measure func=BPRM_CHECK mask=MAY_EXEC
//	measure func=FILE_CHECK mask=^MAY_READ uid=0 pcr=11
//
// Root opening /etc/passwd for reading and writing is a FILE_CHECK of MAY_READ and MAY_WRITE: the first three rules do
// not match (other file system, other label, other function), the fourth does, and the Decision is to measure, PCR 11.
// The same by another user matches nothing, and the Decision is empty. A program on tmpfs matches the first rule, which
// closes measuring, so that the third is not looked at.
//
// # What it promises
//
// Parse takes what Linux 6.12 takes (all of its Kconfig options on) and refuses what that refuses, but says why and
// what to do. String prints as the kernel's policy file does, and what it prints is the same policy when parsed again.
// Match decides as the kernel decides. Source: security/integrity/ima/ima_policy.c (ima_parse_rule, ima_validate_rule,
// ima_match_rules, ima_match_policy, ima_policy_show) and Documentation/ABI/testing/ima_policy.
//
// Where it differs on purpose:
//   - A rule with a control byte is refused. The kernel takes the carriage return of a Windows file as part of a name
//     (fsname=, label=, keyrings=), and the rule then never matches.
//   - appraise_type=sigv3 may come before digest_type=verity. The kernel prints them so and can't read that back.
//   - Ids are printed unsigned. The kernel prints those above 2147483647 as negative, and can't read that back.
//   - fsname= is printed whole; the kernel cuts it at 63 bytes.
//   - fs_subtype= and dont_audit, which are younger than 6.12, are taken.
//   - A label of a security module is a string that is compared. The kernel asks the module whether it knows the label
//     (and refuses, or ignores, the rule if not).
//
// A policy of no rules parses; the kernel refuses to load one. A rule that this program can't yet honour parses too:
// CheckWired refuses it.
//
// A Policy is immutable and may be used by any number of goroutines. Parse, or Builtin, then CheckWired, then Match.
package policy
